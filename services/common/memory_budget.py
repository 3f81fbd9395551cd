"""A budget of bytes that concurrent work shares, which bounds memory."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MemoryBudget:
    """A weighted semaphore over bytes, in the order of requests.

    A request larger than the whole budget is granted alone.

    State: `_used_bytes`; `_waiters`, in order, each counted in `_used_bytes` as soon as it is granted.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, size_bytes: int) -> None:
        """Wait until `size_bytes` are available, and take them."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((size_bytes, waiter))
        self._admit_waiters()
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.cancelled() or not waiter.done():
                waiter.cancel()
                # Requests behind this one may fit now.
                self._admit_waiters()
            else:
                # The bytes were granted just before the cancellation.
                self.release(size_bytes)
            raise

    @asynccontextmanager
    async def reserve(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold `size_bytes` while the block runs."""
        await self.acquire(size_bytes)
        try:
            yield
        finally:
            self.release(size_bytes)

    def release(self, size_bytes: int) -> None:
        """Return bytes that are no longer in use."""
        self._used_bytes -= size_bytes
        self._admit_waiters()

    def _admit_waiters(self) -> None:
        while self._waiters:
            size_bytes, waiter = self._waiters[0]
            if not waiter.done():
                if self._used_bytes and self._used_bytes + size_bytes > self._limit_bytes:
                    return
                self._used_bytes += size_bytes
                waiter.set_result(None)
            self._waiters.popleft()
