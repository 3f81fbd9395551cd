"""Test the helpers for asyncio tasks."""

import asyncio
import logging

import pytest

from services.common.tasks import cancel_and_wait, restart_on_failure


async def test_cancel_and_wait_with_lost_cancellation_ends_task() -> None:
    """A task that swallows its first cancellation, as redis-py may, is cancelled again."""
    swallowed = asyncio.Event()

    async def swallow_first_cancellation() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed.set()
        await asyncio.Event().wait()

    async def fail() -> None:
        raise ValueError

    tasks = [asyncio.create_task(swallow_first_cancellation()), asyncio.create_task(fail())]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await cancel_and_wait(tasks)
    assert swallowed.is_set()
    assert tasks[0].cancelled()
    assert isinstance(tasks[1].exception(), ValueError)


async def test_cancel_and_wait_without_tasks_returns() -> None:
    """An empty list needs no wait."""
    await cancel_and_wait([])


async def test_restart_on_failure_after_unexpected_error_logs_once_and_restarts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The second run continues normally; the log has the error once."""
    starts = 0
    is_running = asyncio.Event()

    async def work() -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            raise TypeError("not foreseen")
        is_running.set()
        await asyncio.Event().wait()

    with caplog.at_level(logging.ERROR):
        task = asyncio.create_task(restart_on_failure(work, name="the work", delay_seconds=0))
        await asyncio.wait_for(is_running.wait(), 30)
    assert [record.message for record in caplog.records] == ["the work failed unexpectedly; it begins anew"]
    await cancel_and_wait([task])
    assert starts == 2
    assert task.cancelled()
