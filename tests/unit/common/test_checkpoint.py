"""Long work takes turns: one breath a round of the event loop, whoever works."""

import asyncio
from contextlib import suppress

from services.common.checkpoint import checkpoint, iter_chunks


async def test_many_take_one_breath_a_round() -> None:
    """Of twenty that work at once, no round of the loop holds more than one breath (but each one's first)."""
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


async def test_who_is_cancelled_holds_up_nobody() -> None:
    """Turns go on to those behind, in their order."""
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


def test_each_loop_has_turns_of_its_own() -> None:
    """A loop that ends while somebody waits leaves nothing behind."""

    async def leave() -> None:
        asyncio.ensure_future(checkpoint())  # noqa: RUF006 - abandoned on purpose
        await asyncio.sleep(0)

    for _ in range(2):
        asyncio.run(leave())
    asyncio.run(asyncio.wait_for(checkpoint(), 30))
