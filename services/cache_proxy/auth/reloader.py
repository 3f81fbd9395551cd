"""Looks after files that may be renewed: every second, told in the metrics and the log."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.common.file_reload import Look

_EVERY_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Renewals:
    """State: `_looks`, what is done every second; filled before `run`."""

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        self._looks: list[Callable[[], object]] = []

    def add(self, look: Callable[[], object]) -> None:
        """Have it called from then on."""
        self._looks.append(look)

    def teller(self, files: str) -> Callable[[Look], None]:
        """Who is to hear what came of looking at these files: one of `metrics.RENEWED`."""
        return partial(self._tell, files)

    async def run(self) -> None:
        """Look, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_SECONDS)
            for look in self._looks:
                look()

    def _tell(self, files: str, found: Look) -> None:
        self._metrics.renewals.labels(files, found.value).inc()
        self._metrics.renewal_failing.labels(files).set(found is Look.FAILED)
        if found is Look.DONE:
            _log.info("renewed: %s", files)
