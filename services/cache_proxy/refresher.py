"""Has answers that are too old, or another version's, asked for again: behind all that somebody waits for.

The new answer goes to the store as any other; whoever asks next finds it there.
"""

import asyncio
from collections.abc import Sequence
from contextvars import Context

from services.cache_proxy.domain import Pair
from services.cache_proxy.errors import ModelUnavailableError, QueueFullError
from services.cache_proxy.queue.interface import Queue, RequestContext
from services.cache_proxy.queue.waiters import WaiterRegistry
from services.common.tasks import cancel_and_wait

_CALLER = ""
_TIMEOUT_SECONDS = 600.0
_MAX_PENDING_PAIRS = 20_000  # twenty batches; whoever asks for the others later has them asked for then


class Refresher:
    """State: `_pending`, what is being asked for again, and the tasks that wait for it; event loop only."""

    def __init__(self, *, queue: Queue, waiters: WaiterRegistry) -> None:
        self._queue = queue
        self._waiters = waiters
        self._pending: set[bytes] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def schedule(self, pairs: Sequence[Pair]) -> None:
        """Have these asked for again, some time; those that are on their way are not asked for twice."""
        room = _MAX_PENDING_PAIRS - len(self._pending)
        fresh = [pair for pair in pairs if pair.digest not in self._pending][:room]
        if fresh:
            self._pending.update(pair.digest for pair in fresh)
            task = asyncio.create_task(self._refresh(fresh), context=Context())  # nobody waits for it
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for none of them any more."""
        await cancel_and_wait(list(self._tasks))

    async def _refresh(self, pairs: Sequence[Pair]) -> None:
        asker = RequestContext(_CALLER, "refresh", asyncio.get_running_loop().time() + _TIMEOUT_SECONDS)
        wait = self._waiters.register([pair.digest for pair in pairs])
        try:
            async with asyncio.timeout_at(asker.deadline):
                enqueued = await self._queue.enqueue(pairs, asker)
                self._waiters.resolve_one(wait, enqueued.outcomes.items())
                await wait.wait()
        except (TimeoutError, QueueFullError, ModelUnavailableError):
            pass  # whoever is next to be given a stale answer has it asked for again
        finally:
            self._pending.difference_update(pair.digest for pair in pairs)
            await self._queue.cancel(self._waiters.unregister(wait))
