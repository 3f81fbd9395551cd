"""A request's bytes, looked at before they are made into messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.wire import holds_more_than

_ITEMS = st.builds(
    pb.SeniorityRequest, uuid=st.integers(-(2**31), 2**31 - 1), company=st.text(max_size=200), title=st.text()
)


@given(st.lists(_ITEMS, max_size=20), st.integers(0, 25))
def test_pairs_are_counted_as_protobuf_counts_them(items: list[pb.SeniorityRequest], limit: int) -> None:
    """For any batch, however its pairs are spelled."""
    message = pb.SeniorityRequestBatch(batch=items).SerializeToString()
    assert holds_more_than(message, limit) is (len(items) > limit)


@given(st.binary(max_size=300), st.integers(0, 20))
def test_any_bytes_are_counted_or_refused(message: bytes, limit: int) -> None:
    """Never another error, never more work than the limit; what protobuf reads within it is not refused."""
    try:
        more = holds_more_than(message, limit)
    except IndexError:
        return
    try:
        parsed = pb.SeniorityRequestBatch.FromString(message)
    except Exception:  # noqa: BLE001 - protobuf has its own say
        return
    assert more or len(parsed.batch) <= limit


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\xff", b"\x0b", b"\xff" * 12])
def test_what_ends_too_early_is_refused(message: bytes) -> None:
    """A cut tag, a cut length, a group, an endless varint."""
    with pytest.raises(IndexError):
        holds_more_than(message, 5)
