"""The model's capacity: one batch at a time, each taking a slot, the rest queueing behind it."""

import asyncio
import time


class Capacity:
    """A batch occupies the model for `max_batch / rate` seconds, or longer if it holds more.

    A batch of one costs what a batch of `max_batch` costs: that is why the proxy sends full ones.
    State: `_free_at` (monotonic seconds); read and written without an await between.
    """

    def __init__(self, *, rate: float, max_batch: int) -> None:
        self._rate = rate
        self._max_batch = max_batch
        self._free_at = time.monotonic()

    async def wait_for_slot(self, pairs: int) -> float:
        """Wait for this batch's turn; seconds waited. `rate` 0 means no limit."""
        now = time.monotonic()
        start = max(now, self._free_at)
        if self._rate:
            self._free_at = start + max(pairs, self._max_batch) / self._rate
        await asyncio.sleep(start - now)
        return start - now
