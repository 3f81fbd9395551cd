"""Limit and time the operations of the store, and fail those that waited for a server that became silent."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.observability.metrics import ProxyMetrics

_MAX_OPERATIONS = 16


class OperationLimiter:
    """Run a limited number of operations at a time.

    State: `_failure_count`, so that an operation that waited for a slot while another one failed fails at
    once instead of waiting for the server too. Used from the event loop only.
    """

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        # A wait for a slot does not mean that the server is slow: only the operation itself is timed.
        self._slots = asyncio.Semaphore(_MAX_OPERATIONS)
        self._failure_count = 0

    @asynccontextmanager
    async def run(self, name: str) -> AsyncIterator[None]:
        """Run the block as an operation; `name` is its metric label `op`. Raises `StoreError`."""
        failure_count = self._failure_count
        async with self._slots:
            if self._failure_count != failure_count:
                raise StoreError("an operation before it failed")
            try:
                with self._metrics.store_duration.labels(name).time():
                    yield
            except StoreRejectedError:
                # The server replied.
                raise
            except StoreError:
                self._failure_count += 1
                raise
