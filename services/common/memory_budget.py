"""How much text may be in work at a time, all files together: what bounds memory."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MemoryBudget:
    """First come, first served. What is larger than all of it gets in alone.

    State: `_used` (bytes), `_waiting` (in order; who is given room is counted in `_used` at once).
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, size_bytes: int) -> None:
        """Wait until there is room for so much more."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((size_bytes, place))
        self._admit_waiters()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled() or not place.done():
                place.cancel()
                self._admit_waiters()  # it may have stood in front of others
            else:  # admitted and cancelled at once
                self.release(size_bytes)
            raise

    @asynccontextmanager
    async def reserve(self, size_bytes: int) -> AsyncIterator[None]:
        """Room for so much, around what needs it."""
        await self.acquire(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)

    def release(self, size_bytes: int) -> None:
        """It is no longer in use."""
        self._used_bytes -= size_bytes
        self._admit_waiters()

    def _admit_waiters(self) -> None:
        while self._waiters:
            size_bytes, place = self._waiters[0]
            if not place.done():
                if self._used_bytes and self._used_bytes + size_bytes > self._limit_bytes:
                    return
                self._used_bytes += size_bytes
                place.set_result(None)
            self._waiters.popleft()
