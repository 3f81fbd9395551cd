"""Tasks that are ended for good."""

import asyncio

from services.common.tasks import cancel_and_wait


async def test_a_task_that_missed_a_cancellation_is_ended_all_the_same() -> None:
    """As one that was sending a command: the first one is forgotten, and it goes on."""
    missed = asyncio.Event()

    async def goes_on() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            missed.set()
        await asyncio.Event().wait()

    async def fails() -> None:
        raise ValueError

    tasks = [asyncio.create_task(goes_on()), asyncio.create_task(fails())]
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await cancel_and_wait(tasks)
    assert missed.is_set()
    assert tasks[0].cancelled()
    assert isinstance(tasks[1].exception(), ValueError)


async def test_nothing_to_end() -> None:
    """No task, no wait."""
    await cancel_and_wait([])
