"""How many pairs a message holds, before they are made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.wire.pair_limit import exceeds_pair_limit

_ITEMS = st.builds(
    pb.SeniorityRequest, uuid=st.integers(-(2**31), 2**31 - 1), company=st.text(max_size=200), title=st.text()
)


@given(st.lists(_ITEMS, max_size=20), st.integers(0, 25))
def test_pairs_are_counted_as_protobuf_counts_them(items: list[pb.SeniorityRequest], limit: int) -> None:
    """For any batch, however its pairs are spelled."""
    message = pb.SeniorityRequestBatch(batch=items).SerializeToString()
    assert exceeds_pair_limit(message, limit) is (len(items) > limit)


@given(st.binary(max_size=300), st.integers(0, 20))
def test_any_bytes_are_counted_or_refused(message: bytes, limit: int) -> None:
    """Never another error; what protobuf reads is not refused, nor are more pairs let through."""
    try:
        parsed = pb.SeniorityRequestBatch.FromString(message)
    except Exception:  # noqa: BLE001 - protobuf has its own say
        parsed = None
    try:
        more = exceeds_pair_limit(message, limit)
    except IndexError:
        assert parsed is None
        return
    assert more or parsed is None or len(parsed.batch) <= limit


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\xff", b"\x0e\x0a", b"\x0a" + b"\xff" * 12])
def test_what_ends_too_early_is_refused(message: bytes) -> None:
    """A cut tag, a cut length, a wire type that is none, an endless varint."""
    with pytest.raises(IndexError):
        exceeds_pair_limit(message, 0)


def test_groups_are_passed_over() -> None:
    """A group that nobody knows is no reason to refuse what protobuf reads."""
    message = b"\x7b\x10\x01\x7c" + b"\x0a\x00" * 3  # group 15 { 2: 1 }
    assert len(pb.SeniorityRequestBatch.FromString(message).batch) == 3
    assert [exceeds_pair_limit(message, limit) for limit in (2, 6)] == [True, False]


def test_tags_that_are_not_minimal_are_tags() -> None:
    """A pair's tag may be spelled in more bytes than it needs."""
    assert exceeds_pair_limit(b"\x8a\x00\x00" * 9, 8)
    assert not exceeds_pair_limit(b"\x8a\x00\x00" * 8, 8)
