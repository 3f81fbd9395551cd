"""Checkpoints: one chunk of long work in each iteration of the event loop."""

import asyncio
from contextlib import suppress

from services.common.checkpoint import checkpoint, iter_chunks


async def test_many_concurrent_tasks_run_one_chunk_each_iteration() -> None:
    """Twenty tasks run no two chunks in one iteration, apart from each task's first chunk."""
    rounds: list[int] = []
    working = True

    async def work() -> None:
        async for some in iter_chunks(range(5), 1):
            if some[0]:
                rounds[-1] += 1

    async def count() -> None:
        while working:
            rounds.append(0)
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.sleep(0)
    await asyncio.gather(*(work() for _ in range(20)))
    working = False
    await counting
    assert sum(rounds) == 80
    assert max(rounds) == 1


async def test_cancelled_tasks_do_not_delay_waiting_tasks() -> None:
    """The tasks that wait behind are released in their order."""
    order: list[int] = []

    async def work(number: int) -> None:
        await checkpoint()
        order.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(6)]
    await asyncio.sleep(0)
    for number in (0, 3, 5):
        tasks[number].cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)
    assert order == [1, 2, 4]
    await asyncio.wait_for(checkpoint(), 30)


def test_checkpoint_after_another_loop_ended_returns() -> None:
    """A loop that ends while a task waits leaves no state to the next loop."""

    async def abandon_checkpoint() -> None:
        # Abandoned on purpose.
        asyncio.ensure_future(checkpoint())  # noqa: RUF006
        await asyncio.sleep(0)

    for _ in range(2):
        asyncio.run(abandon_checkpoint())
    asyncio.run(asyncio.wait_for(checkpoint(), 30))
