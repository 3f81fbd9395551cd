"""Calls that go together: each gets its own result, whatever becomes of the others."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.batching import MicroBatcher


class Driver:
    """Notes its loads; waits at `gate` before each result."""

    def __init__(self, *, open_at_once: bool = True) -> None:
        self.loads: list[list[int]] = []
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        if open_at_once:
            self.gate.set()

    async def drive(self, items: Sequence[int]) -> list[int]:
        """Ten times each."""
        self.loads.append(list(items))
        self.begun.set()
        await self.gate.wait()
        if -1 in items:
            message = "one of them"
            raise ValueError(message)
        return [10 * item for item in items]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 40))
def test_each_gets_its_own_result_in_loads_within_the_bound(sizes: list[int], most: int) -> None:
    """In order, none twice, no load above the bound but an item that is above it alone."""

    async def run() -> list[list[int]]:
        driver = Driver()
        riders = MicroBatcher(driver.drive, size=lambda item: item, max_size=most)
        assert await asyncio.gather(*map(riders.submit, sizes)) == [10 * size for size in sizes]
        return driver.loads

    loads = asyncio.run(run())
    assert [item for load in loads for item in load] == sizes
    assert all(sum(load) <= most or len(load) == 1 for load in loads)
    assert all(sum(load) + following[0] > most for load, following in pairwise(loads))


async def test_who_comes_while_one_is_under_way_goes_with_the_next() -> None:
    """The first goes alone, all that came meanwhile together."""
    driver = Driver(open_at_once=False)
    riders = MicroBatcher(driver.drive, size=lambda _: 1, max_size=100)
    first = asyncio.create_task(riders.submit(1))
    await driver.begun.wait()
    others = [asyncio.create_task(riders.submit(number)) for number in (2, 3, 4)]
    await asyncio.sleep(0)
    driver.gate.set()
    assert await asyncio.gather(first, *others) == [10, 20, 30, 40]
    assert driver.loads == [[1], [2, 3, 4]]


async def test_an_error_reaches_all_that_wait_and_none_that_come_later() -> None:
    """Those in the load and those behind it would wait for the same; the next call is tried anew."""
    driver = Driver(open_at_once=False)
    riders = MicroBatcher(driver.drive, size=lambda _: 1, max_size=2)
    waiting = [asyncio.create_task(riders.submit(number)) for number in (-1, 2, 3, 4, 5)]
    await driver.begun.wait()
    driver.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [ValueError] * 5
    assert await riders.submit(6) == 60


async def test_who_goes_away_takes_nobody_along() -> None:
    """Neither under way nor waiting: the others get theirs, and what nobody waits for is not carried."""
    driver = Driver(open_at_once=False)
    riders = MicroBatcher(driver.drive, size=lambda _: 1, max_size=2)
    tasks = [asyncio.create_task(riders.submit(number)) for number in range(6)]
    await driver.begun.wait()
    for gone in (0, 2, 3):
        tasks[gone].cancel()
    await asyncio.sleep(0)
    driver.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [result for result in results if isinstance(result, int)] == [10, 40, 50]
    assert driver.loads == [[0, 1], [4, 5]]


async def test_all_that_wait_may_go_away() -> None:
    """Nothing is carried then, and who comes later is."""
    driver = Driver(open_at_once=False)
    riders = MicroBatcher(driver.drive, size=lambda _: 1, max_size=1)
    tasks = [asyncio.create_task(riders.submit(number)) for number in range(3)]
    await driver.begun.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    driver.gate.set()
    assert await riders.submit(7) == 70
    assert driver.loads == [[0], [7]]


async def test_a_driver_that_loses_count_is_an_error_for_all_and_not_a_wait_for_ever() -> None:
    """Fewer results than items: nobody is given another's."""

    async def short(items: Sequence[int]) -> list[int]:
        return list(items)[1:]

    riders = MicroBatcher(short, size=lambda _: 1, max_size=10)
    with pytest.raises(ValueError, match="zip"):
        await asyncio.wait_for(riders.submit(1), 30)
    results = await asyncio.wait_for(
        asyncio.gather(riders.submit(1), riders.submit(2), return_exceptions=True), 30
    )
    assert all(isinstance(result, ValueError) for result in results)
