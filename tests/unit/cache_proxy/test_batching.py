"""The micro-batcher: each caller gets its own result, whatever happens to the others."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.batching import MicroBatcher


class RecordingProcessor:
    """Records its batches, and waits at `gate` before it returns."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.started = asyncio.Event()
        if is_open:
            self.gate.set()

    async def process_batch(self, items: Sequence[int]) -> list[int]:
        """Return ten times each item. Raise if -1 is among them."""
        self.batches.append(list(items))
        self.started.set()
        await self.gate.wait()
        if -1 in items:
            message = "one of them"
            raise ValueError(message)
        return [10 * item for item in items]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 40))
def test_items_get_own_results_in_batches_within_max_size(sizes: list[int], max_size: int) -> None:
    """Items stay in order, and only a single item may exceed the maximum size."""

    async def run() -> list[list[int]]:
        processor = RecordingProcessor()
        batcher = MicroBatcher(processor.process_batch, size=lambda item: item, max_size=max_size)
        assert await asyncio.gather(*map(batcher.submit, sizes)) == [10 * size for size in sizes]
        return processor.batches

    batches = asyncio.run(run())
    assert [item for batch in batches for item in batch] == sizes
    assert all(sum(batch) <= max_size or len(batch) == 1 for batch in batches)
    assert all(sum(batch) + following[0] > max_size for batch, following in pairwise(batches))


async def test_items_submitted_during_batch_go_together_in_next_one() -> None:
    """The first item is processed alone, all later ones together."""
    processor = RecordingProcessor(is_open=False)
    batcher = MicroBatcher(processor.process_batch, size=lambda _: 1, max_size=100)
    first = asyncio.create_task(batcher.submit(1))
    await processor.started.wait()
    others = [asyncio.create_task(batcher.submit(number)) for number in (2, 3, 4)]
    await asyncio.sleep(0)
    processor.gate.set()
    assert await asyncio.gather(first, *others) == [10, 20, 30, 40]
    assert processor.batches == [[1], [2, 3, 4]]


async def test_error_reaches_all_waiting_items_and_no_later_one() -> None:
    """Items behind the failed batch would wait for the same error. The next item starts a new batch."""
    processor = RecordingProcessor(is_open=False)
    batcher = MicroBatcher(processor.process_batch, size=lambda _: 1, max_size=2)
    waiting = [asyncio.create_task(batcher.submit(number)) for number in (-1, 2, 3, 4, 5)]
    await processor.started.wait()
    processor.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 5
    assert await batcher.submit(6) == 60


async def test_cancelled_items_do_not_affect_others() -> None:
    """The other items get their results, and cancelled items are not processed."""
    processor = RecordingProcessor(is_open=False)
    batcher = MicroBatcher(processor.process_batch, size=lambda _: 1, max_size=2)
    tasks = [asyncio.create_task(batcher.submit(number)) for number in range(6)]
    await processor.started.wait()
    for gone in (0, 2, 3):
        tasks[gone].cancel()
    await asyncio.sleep(0)
    processor.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for result in results if isinstance(result, int)] == [10, 40, 50]
    assert processor.batches == [[0, 1], [4, 5]]


async def test_all_waiting_items_can_be_cancelled() -> None:
    """None of them is processed, and a later item is."""
    processor = RecordingProcessor(is_open=False)
    batcher = MicroBatcher(processor.process_batch, size=lambda _: 1, max_size=1)
    tasks = [asyncio.create_task(batcher.submit(number)) for number in range(3)]
    await processor.started.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    processor.gate.set()
    assert await batcher.submit(7) == 70
    assert processor.batches == [[0], [7]]


async def test_wrong_number_of_results_is_an_error_for_all() -> None:
    """No item waits forever, and none gets the result of another."""

    async def short(items: Sequence[int]) -> list[int]:
        return list(items)[1:]

    batcher = MicroBatcher(short, size=lambda _: 1, max_size=10)
    with pytest.raises(ValueError, match="zip"):
        await asyncio.wait_for(batcher.submit(1), 30)
    results = await asyncio.wait_for(
        asyncio.gather(batcher.submit(1), batcher.submit(2), return_exceptions=True), 30
    )
    assert all(isinstance(result, ValueError) for result in results)
