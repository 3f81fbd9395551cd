"""Tests that messages encoded and decoded by hand equal those of protobuf."""

from hypothesis import given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.augmenter.client import wire
from services.augmenter.client.wire import FIRST_UUID
from services.augmenter.domain import Pair

_TEXTS = st.text(max_size=6) | st.sampled_from(
    ["", "x" * 60, "x" * 61, "x" * 127, "x" * 128, "x" * 200, "é", "\0"]
)


@given(st.lists(st.builds(Pair, _TEXTS, _TEXTS), min_size=1, max_size=5), st.sampled_from([1, 150]))
def test_request_equals_protobufs(pairs: list[Pair], times: int) -> None:
    """A request encoded by hand is decoded by protobuf to the pairs with their uuids.

    Its bytes are the same as protobuf's unless a text is empty.
    """
    batch = pairs * times
    expected = pb.SeniorityRequestBatch(
        batch=[
            pb.SeniorityRequest(uuid=uuid, company=pair.company, title=pair.title)
            for uuid, pair in enumerate(batch, FIRST_UUID)
        ]
    )
    assert pb.SeniorityRequestBatch.FromString(wire.encode_request(batch)) == expected
    if all(pair.company and pair.title for pair in pairs):
        assert wire.encode_request(batch) == expected.SerializeToString()


def test_batch_over_the_limit_is_left_to_protobuf() -> None:
    """Batches of more than 4096 pairs are encoded by protobuf."""
    limit = 4096
    for count in (limit, limit + 1):
        decoded = pb.SeniorityRequestBatch.FromString(wire.encode_request([Pair("a", "b")] * count))
        assert [item.uuid for item in decoded.batch] == list(range(FIRST_UUID, FIRST_UUID + count))
        answer = _response([(uuid, 7) for uuid in range(FIRST_UUID, FIRST_UUID + count)])
        assert wire.decode_ordered_levels(answer, count) == (b"\7" * count if count == limit else None)


def _response(levels: list[tuple[int, int]]) -> bytes:
    batch = [pb.SeniorityResponse(uuid=uuid, seniority=level) for uuid, level in levels]
    return pb.SeniorityResponseBatch(batch=batch).SerializeToString()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=300))
def test_response_in_order_is_decoded(levels: list[int]) -> None:
    """The levels of a response in the order of the request are decoded by hand."""
    assert wire.decode_ordered_levels(_response(list(enumerate(levels, FIRST_UUID))), len(levels)) == bytes(
        levels
    )


@given(
    st.lists(st.tuples(st.integers(FIRST_UUID - 2, FIRST_UUID + 5), st.integers(-1, 9)), max_size=5)
    | st.permutations(range(FIRST_UUID, FIRST_UUID + 130)).map(lambda order: [(uuid, 3) for uuid in order]),
    st.integers(1, 130),
)
def test_other_responses_are_left_to_protobuf(answers: list[tuple[int, int]], count: int) -> None:
    """A response with another order or count, or with an invalid level, is not decoded by hand."""
    decoded = wire.decode_ordered_levels(_response(answers), count)
    if decoded is not None:
        assert answers == list(enumerate(decoded, FIRST_UUID))
        assert all(1 <= level <= 7 for level in decoded)
