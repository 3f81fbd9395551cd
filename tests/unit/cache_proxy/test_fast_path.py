"""The fast path: which items are answered from their bytes, and when it yields to other tasks."""

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


def _cache_with_levels(*pairs: tuple[str, str]) -> L1Cache:
    """Return an L1 cache in which these pairs have the levels 1, 2, 3 and so on."""
    cache = L1Cache(max_bytes=2**20)
    for level, (company, title) in enumerate(pairs, 1):
        key = pb.SeniorityRequest(company=company, title=title).SerializeToString()
        cache.put(key, level, digest=bytes(16), epoch=cache.epoch)
    return cache


def _item(uuid: int, company: str, title: str) -> bytes:
    return pb.SeniorityRequest(uuid=uuid, company=company, title=title).SerializeToString()


def _run_without_awaiting(coroutine: Coroutine[Any, Any, _Result]) -> _Result:
    """Return the result of a coroutine that never awaits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: _Result = stop.value
        return result
    raise AssertionError


@given(
    st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), st.sampled_from(["a", "b", "", "new"])), max_size=30)
)
def test_known_items_are_answered_with_their_uuid_and_level(requested: list[tuple[int, str]]) -> None:
    """Each known item's response equals protobuf's, byte for byte, at the same position."""
    cache = _cache_with_levels(("a", "t"), ("b", "t"), ("", ""))
    levels = {"a": 1, "b": 2, "": 3}
    items = [_item(uuid, company, "t" if company else "") for uuid, company in requested]
    answers, missing = _run_without_awaiting(answer_batch(items, cache))
    assert missing == [at for at, (_, company) in enumerate(requested) if company == "new"]
    assert answers == [
        batches.response_item(uuid, levels[company]) if company in levels else b""
        for uuid, company in requested
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
def test_single_pair_is_answered_like_a_batch_of_one(uuid: bytes, rest: bytes, frame: str) -> None:
    """`answer_single` answers only requests of one pair, and as `answer_batch` does."""
    cache = _cache_with_levels(("a", "t"), ("", ""))
    item = uuid + rest
    size = len(item) + {"short": -1, "long": 1}.get(frame, 0)
    message = bytes((0x0A, size % 128)) + item + (batches.join([item]) if frame == "two" else b"")
    items = batches.split(message, max_pairs=10)
    expected = None
    if isinstance(items, list) and len(items) == 1 and batches.join(items) == message:
        answers, missing = _run_without_awaiting(answer_batch(items, cache))
        expected = None if missing else batches.join(answers)
    assert answer_single(message, cache) == expected


def test_single_pair_longer_than_127_bytes_is_not_answered() -> None:
    """An item whose length takes two bytes is left to `answer_batch`, a shorter one is answered."""
    for length, known in ((120, True), (121, False)):
        cache = _cache_with_levels(("c" * length, "t"))
        message = batches.join([_item(7, "c" * length, "t")])
        assert answer_single(message, cache) == (
            batches.join([batches.response_item(7, 1)]) if known else None
        )


def test_single_pair_whose_level_was_removed_is_not_answered() -> None:
    """An entry whose level was removed is no hit."""
    cache = _cache_with_levels(("a", "t"))
    message = batches.join([_item(1, "a", "t")])
    assert answer_single(message, cache) == batches.join([batches.response_item(1, 1)])
    cache.remove(bytes(16))
    assert answer_single(message, cache) is None


@pytest.mark.parametrize(
    ("pairs", "awaits"), [(0, False), (1, False), (1000, False), (2000, False), (2001, True)]
)
async def test_batch_of_hits_yields_only_above_2000_pairs(pairs: int, awaits: bool) -> None:
    """The model's batch size, and twice that, are answered without a checkpoint, more with one."""
    cache = _cache_with_levels(("a", "t"))
    answering = asyncio.create_task(answer_batch([_item(1, "a", "t")] * pairs, cache))
    await asyncio.sleep(0)
    assert answering.done() is not awaits
    answers, missing = await answering
    assert (len(answers), missing) == (pairs, [])


@pytest.mark.parametrize("cut", [b"", b"\x08", b"\x08\x80", b"\x08\xff\xff", b"\x08\x80\x00"])
def test_item_truncated_within_its_uuid_is_missing(cut: bytes) -> None:
    """A truncated item is left to protobuf."""
    cache = _cache_with_levels(("a", "t"))
    assert _run_without_awaiting(answer_batch([cut], cache)) == ([b""], [0])


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
def test_item_with_nonstandard_uuid_is_missing(uuid: bytes) -> None:
    """The bytes of a known pair are no hit after a uuid that is not minimally encoded."""
    cache = _cache_with_levels(("a", "t"))
    assert _run_without_awaiting(answer_batch([uuid + _item(0, "a", "t")], cache)) == ([b""], [0])


def test_item_whose_level_was_removed_is_missing() -> None:
    """An entry whose level was removed is no hit, and becomes one again when it is put."""
    cache = _cache_with_levels(("a", "t"))
    cache.remove(bytes(16))
    items = [_item(1, "a", "t")]
    assert _run_without_awaiting(answer_batch(items, cache)) == ([b""], [0])
    cache.put(items[0][2:], 6, digest=bytes(16), epoch=cache.epoch)
    assert _run_without_awaiting(answer_batch(items, cache)) == ([batches.response_item(1, 6)], [])
