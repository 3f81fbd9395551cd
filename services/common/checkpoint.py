"""Split long work into chunks that yield to the event loop, so that a call to the model leaves on time."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

_Item = TypeVar("_Item")


class _CheckpointQueue:
    """Run one chunk of long work in each iteration of the event loop, whichever request it belongs to.

    Without it, each of many large requests would run a chunk in every iteration. An iteration would then last
    as long as all these chunks together, and a small request takes several iterations.

    State: `_waiting`, the tasks that wait for the next chunk, in the order in which they came. It belongs to
    `_loop`, the event loop that runs now, and is used by one loop at a time.
    """

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self) -> None:
        """Return in a later iteration of the event loop, after the tasks that waited before."""
        loop = asyncio.get_running_loop()
        # After another loop, which is closed by now: none of its tasks waits any longer.
        if self._loop is not loop:
            self._loop = loop
            self._waiting = deque()
        turn = loop.create_future()
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            loop.call_soon(self._release_next)
        await turn

    def _release_next(self) -> None:
        # Skip tasks that were cancelled while they waited.
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        if self._waiting:
            self._waiting.popleft().set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._release_next)


checkpoint = _CheckpointQueue().wait
"""Let other tasks run; return in a later iteration of the event loop."""


async def iter_chunks(
    items: Sequence[_Item], max_items: int, *, size: Callable[[_Item], int] | None = None, max_size: int = 0
) -> AsyncIterator[Sequence[_Item]]:
    """Yield the items in chunks, with a checkpoint between two chunks.

    A chunk has at most `max_items` items. If `size` is given, it also has at most `max_size` in all, unless
    it is a single item.
    """
    start = 0
    while start < len(items):
        if start:
            await checkpoint()
        chunk = items[start : start + max_items]
        while size is not None and len(chunk) > 1 and sum(map(size, chunk)) > max_size:
            chunk = chunk[: len(chunk) // 2]
        yield chunk
        start += len(chunk)
