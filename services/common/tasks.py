"""Helpers for asyncio tasks: cancel them, run them together, and restart those that must not end."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

_RETRY_SECONDS = 0.1
_RESTART_DELAY_SECONDS = 1.0

_T = TypeVar("_T")
_R = TypeVar("_R")
_log = logging.getLogger(__name__)


async def cancel_and_wait(tasks: Iterable["asyncio.Future[Any]"]) -> None:
    """Cancel tasks and return when all of them have ended, with or without an error.

    One cancellation is not enough. In Python 3.11 `asyncio.wait_for` loses a cancellation that arrives in the
    moment in which the awaited future completes (gh-86296), and redis-py sends every command through it.
    Measured: one in ten cancellations during a command was lost. So a task is cancelled again until it ends.
    """
    cancelled = set(tasks)
    pending = cancelled
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_RETRY_SECONDS)
    # Retrieve the exceptions, so that asyncio does not log them as never retrieved.
    await asyncio.gather(*cancelled, return_exceptions=True)


async def gather_or_cancel(coroutines: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run coroutines concurrently and return their results in order.

    Unlike with `asyncio.gather`, when one fails or the caller is cancelled, the others are cancelled and
    awaited before this returns. The first error is raised itself, not in an exception group, because users
    read its message.
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
    """Yield each item with the result of `function`, in the order of the items.

    All calls run concurrently. `items` limits how many: it decides when it yields the next item.
    """
    started: asyncio.Queue[tuple[_T, asyncio.Task[_R]] | None] = asyncio.Queue()
    tasks: set[asyncio.Task[_R]] = set()

    async def start_all() -> None:
        async for item in items:
            task = asyncio.create_task(function(item))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            started.put_nowait((item, task))
            # Without this the loop would keep them in memory until the next item arrives.
            del item, task

    starter = asyncio.create_task(start_all())
    starter.add_done_callback(lambda _: started.put_nowait(None))
    try:
        while entry := await started.get():
            item, task = entry
            result = [(item, await task)]
            # The consumer holds the only reference to what it is given, so that it can free the memory.
            del entry, item, task
            yield result.pop()
        await starter
    finally:
        await cancel_and_wait([starter, *tasks])


async def restart_on_failure(
    work: Callable[[], Awaitable[None]], *, name: str, delay_seconds: float = _RESTART_DELAY_SECONDS
) -> None:
    """Run `work` again and again, `delay_seconds` after each end, until this task is cancelled.

    An unexpected error is logged with `name`.
    """
    while True:
        try:
            await work()
        except Exception:  # noqa: BLE001 - see above
            # Any error may occur here. A task that ends without a log line would be worse.
            _log.exception("%s failed unexpectedly; it begins anew", name)
        await asyncio.sleep(delay_seconds)
