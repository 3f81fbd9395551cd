"""Tasks that end with whoever began them."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from services.common.tasks import cancel_and_wait

_T = TypeVar("_T")
_R = TypeVar("_R")


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """`asyncio.gather`, but when one fails, or the caller is cancelled, the others are ended first.

    The failure is raised itself, not in an exception group: it is what the user will read.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def map_ordered(
    items: AsyncGenerator[_T], function: Callable[[_T], Coroutine[Any, Any, _R]]
) -> AsyncGenerator[tuple[_T, _R]]:
    """Each item with the result of its work, in order; all work goes on at once.

    How far ahead is for `items` to bound, by when it makes the next one.
    """
    begun: asyncio.Queue[tuple[_T, asyncio.Task[_R]] | None] = asyncio.Queue()
    tasks: set[asyncio.Task[_R]] = set()

    async def begin_all() -> None:
        async for item in items:
            task = asyncio.create_task(function(item))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            begun.put_nowait((item, task))
            del item, task  # or the loop would hold them until it has the next

    beginning = asyncio.create_task(begin_all())
    beginning.add_done_callback(lambda _: begun.put_nowait(None))
    try:
        while made := await begun.get():
            item, task = made
            done = [(item, await task)]
            del made, item, task
            yield done.pop()  # whoever takes it is the only one who holds it
        await beginning
    finally:
        await cancel_and_wait([beginning, *tasks])
