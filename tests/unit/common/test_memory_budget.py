"""Tests of the memory budget."""

import asyncio

import pytest

from services.common.memory_budget import MemoryBudget


async def test_memory_budget_is_granted_in_order() -> None:
    """A request that does not fit waits, with all after it. One larger than the budget is granted alone."""
    budget = MemoryBudget(limit_bytes=10)
    await budget.acquire(6)
    waiting = [asyncio.create_task(budget.acquire(size)) for size in (50, 1)]
    await asyncio.sleep(0)
    assert [task.done() for task in waiting] == [False, False]
    budget.release(6)
    await waiting[0]
    assert not waiting[1].done()
    budget.release(50)
    await waiting[1]


async def test_cancelled_request_for_memory_does_not_block_the_others() -> None:
    """Cancelled while waiting, or just after it was granted: the memory is available to the next."""
    budget = MemoryBudget(limit_bytes=10)
    await budget.acquire(6)
    first = asyncio.create_task(budget.acquire(9))
    second = asyncio.create_task(budget.acquire(4))
    await asyncio.sleep(0)
    first.cancel()
    await second
    third = asyncio.create_task(budget.acquire(6))
    await asyncio.sleep(0)
    budget.release(6)
    # Granted, and cancelled before its task runs.
    third.cancel()
    with pytest.raises(asyncio.CancelledError):
        await third
    await asyncio.wait_for(budget.acquire(6), 5)
