"""The pair limit: pairs of a serialized request are counted without parsing it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.wire.pair_limit import exceeds_pair_limit

_ITEMS = st.builds(
    pb.SeniorityRequest, uuid=st.integers(-(2**31), 2**31 - 1), company=st.text(max_size=200), title=st.text()
)


@given(st.lists(_ITEMS, max_size=20), st.integers(0, 25))
def test_pair_count_of_any_batch_agrees_with_protobuf(items: list[pb.SeniorityRequest], limit: int) -> None:
    """The limit is exceeded exactly if protobuf reads more pairs."""
    message = pb.SeniorityRequestBatch(batch=items).SerializeToString()
    assert exceeds_pair_limit(message, limit) is (len(items) > limit)


@given(st.binary(max_size=300), st.integers(0, 20))
def test_arbitrary_bytes_never_pass_with_more_pairs_than_the_limit(message: bytes, limit: int) -> None:
    """Only IndexError is raised, only for what protobuf rejects, and no excess pairs pass."""
    try:
        parsed = pb.SeniorityRequestBatch.FromString(message)
    # Protobuf may reject the bytes.
    except Exception:  # noqa: BLE001
        parsed = None
    try:
        more = exceeds_pair_limit(message, limit)
    except IndexError:
        assert parsed is None
        return
    assert more or parsed is None or len(parsed.batch) <= limit


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\xff", b"\x0e\x0a", b"\x0a" + b"\xff" * 12])
def test_truncated_message_raises_index_error(message: bytes) -> None:
    """A truncated tag, a truncated length, an unknown wire type, an endless varint."""
    with pytest.raises(IndexError):
        exceeds_pair_limit(message, 0)


def test_unknown_group_is_skipped() -> None:
    """An unknown group does not cause a request to be rejected that protobuf reads."""
    # group 15 { 2: 1 }, then three empty pairs.
    message = b"\x7b\x10\x01\x7c" + b"\x0a\x00" * 3
    assert len(pb.SeniorityRequestBatch.FromString(message).batch) == 3
    assert [exceeds_pair_limit(message, limit) for limit in (2, 6)] == [True, False]


def test_tag_in_longer_encoding_counts_as_pair() -> None:
    """A pair's tag may be encoded in more bytes than it needs."""
    assert exceeds_pair_limit(b"\x8a\x00\x00" * 9, 8)
    assert not exceeds_pair_limit(b"\x8a\x00\x00" * 8, 8)
