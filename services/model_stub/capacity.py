"""The capacity of the model: one batch at a time, other batches wait for their slots."""

import asyncio
import time


class Capacity:
    """Slots of the model. A batch takes `max_batch / rate` seconds, or longer if it holds more pairs.

    A batch of one pair costs as much as a full one, so the proxy should send full batches.
    State: `_free_at` (monotonic seconds), read and written without an `await` in between.
    """

    def __init__(self, *, rate: float, max_batch: int) -> None:
        self._rate = rate
        self._max_batch = max_batch
        self._free_at = time.monotonic()

    async def wait_for_slot(self, pairs: int) -> float:
        """Wait for the slot of this batch. Return the seconds waited. `rate` 0 means no limit."""
        now = time.monotonic()
        start = max(now, self._free_at)
        if self._rate:
            self._free_at = start + max(pairs, self._max_batch) / self._rate
        await asyncio.sleep(start - now)
        return start - now
