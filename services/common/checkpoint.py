"""Long work in short breaths: a call to the model must leave on time, whatever a caller sent meanwhile."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


class _CheckpointQueue:
    """One breath in each round of the event loop, whoever works: else many large requests make every round as
    long as all their breaths together, and a small one takes several rounds.

    State: `_waiting`, in the order in which they came; event loop only, one loop at a time.
    """  # noqa: D205 - one thought

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # the one before is closed, and nobody in it waits any more
            self._loop, self._waiting = loop, deque()
        mine = loop.create_future()
        self._waiting.append(mine)
        if len(self._waiting) == 1:
            loop.call_soon(self._release_next)
        await mine

    def _release_next(self) -> None:
        while self._waiting and self._waiting[0].done():  # cancelled
            self._waiting.popleft()
        if self._waiting:
            self._waiting.popleft().set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._release_next)


checkpoint = _CheckpointQueue().wait
"""Let others have turns, and come back when it is one's own."""


async def iter_chunks(
    items: Sequence[_Item], max_items: int, *, size: Callable[[_Item], int] | None = None, max_size: int = 0
) -> AsyncIterator[Sequence[_Item]]:
    """So many at a time, of `most_size` in all at most, but at least one; others have turns between."""
    start = 0
    while start < len(items):
        if start:
            await checkpoint()
        some = items[start : start + max_items]
        while size is not None and len(some) > 1 and sum(map(size, some)) > max_size:
            some = some[: len(some) // 2]
        yield some
        start += len(some)
