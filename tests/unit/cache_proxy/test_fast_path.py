"""The hot path: what is answered on bytes, and when others have their turn."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.fast_path import answer_batch, answer_single
from services.cache_proxy.wire import batches

_Result = TypeVar("_Result")


def _known(*pairs: tuple[str, str]) -> L1Cache:
    """An L1 in which these have the levels 1, 2, 3 and so on."""
    cache = L1Cache(max_bytes=2**20)
    for level, (company, title) in enumerate(pairs, 1):
        key = pb.SeniorityRequest(company=company, title=title).SerializeToString()
        cache.put(key, level, digest=bytes(16), epoch=cache.epoch)
    return cache


def _item(uuid: int, company: str, title: str) -> bytes:
    return pb.SeniorityRequest(uuid=uuid, company=company, title=title).SerializeToString()


def _at_once(work: Coroutine[Any, Any, _Result]) -> _Result:
    """What comes of work that never awaits."""
    try:
        work.send(None)
    except StopIteration as ended:
        result: _Result = ended.value
        return result
    raise AssertionError


@given(
    st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.sampled_from(["a", "b", "", "new"])), max_size=30)
)
def test_every_uuid_comes_back_with_its_pairs_level(asked: list[tuple[int, str]]) -> None:
    """Each known item's answer is the one that messages would give, byte for byte, in its own place."""
    cache = _known(("a", "t"), ("b", "t"), ("", ""))
    levels = {"a": 1, "b": 2, "": 3}
    items = [_item(uuid, company, "t" if company else "") for uuid, company in asked]
    answers, missing = _at_once(answer_batch(items, cache))
    assert missing == [at for at, (_, company) in enumerate(asked) if company == "new"]
    assert answers == [
        batches.response_item(uuid, levels[company]) if company in levels else b"" for uuid, company in asked
    ]


_UUIDS = st.one_of(
    st.integers(-(2**31), 2**31 - 1).map(lambda uuid: _item(uuid, "", "")), st.binary(max_size=11)
)


@given(
    uuid=_UUIDS,
    rest=st.one_of(st.sampled_from([_item(0, "a", "t"), b"", _item(0, "new", "t")]), st.binary(max_size=8)),
    frame=st.sampled_from(["whole", "short", "long", "two"]),
)
@example(uuid=b"\x08\x80\x00", rest=b"", frame="whole")
def test_one_pair_is_answered_as_in_a_batch(uuid: bytes, rest: bytes, frame: str) -> None:
    """What has an answer by the short way is one pair, and the long way answers it the same."""
    cache = _known(("a", "t"), ("", ""))
    item = uuid + rest
    size = len(item) + {"short": -1, "long": 1}.get(frame, 0)
    message = bytes((0x0A, size % 128)) + item + (batches.join([item]) if frame == "two" else b"")
    items = batches.split(message, max_pairs=10)
    expected = None
    if isinstance(items, list) and len(items) == 1 and batches.join(items) == message:
        answers, missing = _at_once(answer_batch(items, cache))
        expected = None if missing else batches.join(answers)
    assert answer_single(message, cache) == expected


def test_one_long_pair_takes_the_long_way() -> None:
    """An item whose length takes two bytes is none of the short way's business; the longest below it is."""
    for length, known in ((120, True), (121, False)):
        cache = _known(("c" * length, "t"))
        message = batches.join([_item(7, "c" * length, "t")])
        assert answer_single(message, cache) == (
            batches.join([batches.response_item(7, 1)]) if known else None
        )


def test_a_forgotten_answer_to_one_pair_is_none() -> None:
    """An entry whose answer was taken from it is no hit by the short way either."""
    cache = _known(("a", "t"))
    message = batches.join([_item(1, "a", "t")])
    assert answer_single(message, cache) == batches.join([batches.response_item(1, 1)])
    cache.remove(bytes(16))
    assert answer_single(message, cache) is None


@pytest.mark.parametrize(
    ("pairs", "awaits"), [(0, False), (1, False), (1000, False), (2000, False), (2001, True)]
)
async def test_a_batch_of_hits_awaits_only_if_it_is_large(pairs: int, awaits: bool) -> None:
    """As many as the model takes, and twice that, are answered without a turn for others; more breathe."""
    cache = _known(("a", "t"))
    answering = asyncio.create_task(answer_batch([_item(1, "a", "t")] * pairs, cache))
    await asyncio.sleep(0)
    assert answering.done() is not awaits
    answers, missing = await answering
    assert (len(answers), missing) == (pairs, [])


@pytest.mark.parametrize("cut", [b"", b"\x08", b"\x08\x80", b"\x08\xff\xff", b"\x08\x80\x00"])
def test_what_ends_within_its_uuid_is_nobodys_answer(cut: bytes) -> None:
    """An item that is cut is left to protobuf."""
    cache = _known(("a", "t"))
    assert _at_once(answer_batch([cut], cache)) == ([b""], [0])


@pytest.mark.parametrize(
    "uuid",
    [
        b"\x08\x80\x00",
        b"\x08\x85\x00",
        b"\x08\x85\x80\x00",
        b"\x88\x00\x05",
        b"\x20\x05",
        b"\x08\xff\xff\xff\xff\x0f",
    ],
)
def test_a_uuid_that_is_spelled_oddly_is_left_to_protobuf(uuid: bytes) -> None:
    """Before the very bytes of a known pair, what is no minimal uuid makes it none of L1's business."""
    cache = _known(("a", "t"))
    assert _at_once(answer_batch([uuid + _item(0, "a", "t")], cache)) == ([b""], [0])


def test_a_forgotten_answer_is_missing() -> None:
    """An entry whose answer was taken from it is no hit, and becomes one again when it is put."""
    cache = _known(("a", "t"))
    cache.remove(bytes(16))
    items = [_item(1, "a", "t")]
    assert _at_once(answer_batch(items, cache)) == ([b""], [0])
    cache.put(items[0][2:], 6, digest=bytes(16), epoch=cache.epoch)
    assert _at_once(answer_batch(items, cache)) == ([batches.response_item(1, 6)], [])
