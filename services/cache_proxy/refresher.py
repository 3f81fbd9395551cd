"""Refresh stale answers in the background, at the lowest priority.

A stale answer is older than `--cache-ttl` or belongs to the previous model version. The new answer goes to
the store like any other, and the next request for the pair finds it there.
"""

import asyncio
from collections.abc import Sequence
from contextvars import Context

from services.cache_proxy.domain import REFRESH, Pair
from services.cache_proxy.errors import ModelUnavailableError, QueueFullError
from services.cache_proxy.queue.interface import Queue, RequestContext
from services.cache_proxy.queue.waiters import WaiterRegistry
from services.common.tasks import cancel_and_wait

_CALLER = ""
_TIMEOUT_SECONDS = 600.0
# Twenty batches. Pairs beyond them are refreshed when they are requested again.
_MAX_PENDING_PAIRS = 20_000


class Refresher:
    """Enqueues stale pairs and waits for their new answers.

    State (event loop only):

    - `_pending`: the digests that are being refreshed.
    - `_tasks`: the tasks that wait for their answers.
    """

    def __init__(self, *, queue: Queue, waiters: WaiterRegistry) -> None:
        self._queue = queue
        self._waiters = waiters
        self._pending: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def schedule(self, pairs: Sequence[Pair]) -> None:
        """Start to refresh the pairs, except those that are being refreshed already."""
        available = _MAX_PENDING_PAIRS - len(self._pending)
        new_pairs = [pair for pair in pairs if pair.digest not in self._pending][:available]
        if new_pairs:
            self._pending.update(pair.digest for pair in new_pairs)
            # An empty context: the refresh is no part of the trace of the request that caused it.
            task = asyncio.create_task(self._refresh(new_pairs), context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel all refreshes."""
        await cancel_and_wait(list(self._tasks))

    async def _refresh(self, pairs: Sequence[Pair]) -> None:
        deadline = asyncio.get_running_loop().time() + _TIMEOUT_SECONDS
        context = RequestContext(_CALLER, REFRESH, deadline)
        waiter = self._waiters.register([pair.digest for pair in pairs])
        try:
            async with asyncio.timeout_at(deadline):
                enqueued = await self._queue.enqueue(pairs, context)
                self._waiters.resolve_one(waiter, enqueued.outcomes.items())
                await waiter.wait()
        except (TimeoutError, QueueFullError, ModelUnavailableError):
            # The next request that gets a stale answer schedules the refresh again.
            pass
        finally:
            self._pending.difference_update(pair.digest for pair in pairs)
            await self._queue.cancel(self._waiters.unregister(waiter))
