"""The messages that are made and read by hand are those that the stubs make and read."""

from hypothesis import given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.augmenter.client import wire
from services.augmenter.client.wire import FIRST_UUID
from services.augmenter.pipeline.jsonl import Pair

_TEXTS = st.text(max_size=6) | st.sampled_from(
    ["", "x" * 60, "x" * 61, "x" * 127, "x" * 128, "x" * 200, "é", "\0"]
)


@given(st.lists(st.builds(Pair, _TEXTS, _TEXTS), min_size=1, max_size=5), st.sampled_from([1, 150]))
def test_request_is_the_stubs(pairs: list[Pair], times: int) -> None:
    """Read by the stub, a request is the pairs with uuids; it is the stub's bytes unless a text is empty."""
    batch = pairs * times
    made = pb.SeniorityRequestBatch(
        batch=[
            pb.SeniorityRequest(uuid=uuid, company=pair.company, title=pair.title)
            for uuid, pair in enumerate(batch, FIRST_UUID)
        ]
    )
    assert pb.SeniorityRequestBatch.FromString(wire.encode_request(batch)) == made
    if all(pair.company and pair.title for pair in pairs):
        assert wire.encode_request(batch) == made.SerializeToString()


def test_longest_batch_and_longer() -> None:
    """Batches of more than 4096 pairs are the stub's."""
    most = 4096
    for count in (most, most + 1):
        read = pb.SeniorityRequestBatch.FromString(wire.encode_request([Pair("a", "b")] * count))
        assert [one.uuid for one in read.batch] == list(range(FIRST_UUID, FIRST_UUID + count))
        answer = _answer([(uuid, 7) for uuid in range(FIRST_UUID, FIRST_UUID + count)])
        assert wire.decode_ordered_levels(answer, count) == (b"\7" * count if count == most else None)


def _answer(levels: list[tuple[int, int]]) -> bytes:
    batch = [pb.SeniorityResponse(uuid=uuid, seniority=level) for uuid, level in levels]
    return pb.SeniorityResponseBatch(batch=batch).SerializeToString()


@given(st.lists(st.integers(1, 7), min_size=1, max_size=300))
def test_answer_in_order_is_read(levels: list[int]) -> None:
    """The levels of an answer in the order of the batch are read as they stand."""
    assert wire.decode_ordered_levels(_answer(list(enumerate(levels, FIRST_UUID))), len(levels)) == bytes(
        levels
    )


@given(
    st.lists(st.tuples(st.integers(FIRST_UUID - 2, FIRST_UUID + 5), st.integers(-1, 9)), max_size=5)
    | st.permutations(range(FIRST_UUID, FIRST_UUID + 130)).map(lambda order: [(uuid, 3) for uuid in order]),
    st.integers(1, 130),
)
def test_any_other_answer_is_left_to_the_stub(answers: list[tuple[int, int]], count: int) -> None:
    """Another order, another count, a level that is none: never read by hand."""
    read = wire.decode_ordered_levels(_answer(answers), count)
    if read is not None:
        assert answers == list(enumerate(read, FIRST_UUID))
        assert all(1 <= level <= 7 for level in read)
