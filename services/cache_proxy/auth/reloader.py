"""Looks after files that may be renewed: every second, told in the metrics and the log."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.common.file_reload import ReloadResult

_INTERVAL_SECONDS = 1.0
_log = logging.getLogger(__name__)


class FileReloader:
    """State: `_looks`, what is done every second; filled before `run`."""

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        self._checks: list[Callable[[], object]] = []

    def add(self, look: Callable[[], object]) -> None:
        """Have it called from then on."""
        self._checks.append(look)

    def on_reload(self, files: str) -> Callable[[ReloadResult], None]:
        """Who is to hear what came of looking at these files: one of `metrics.RENEWED`."""
        return partial(self._record, files)

    async def run(self) -> None:
        """Look, until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            for look in self._checks:
                look()

    def _record(self, files: str, found: ReloadResult) -> None:
        self._metrics.reloads.labels(files, found.value).inc()
        self._metrics.reload_failing.labels(files).set(found is ReloadResult.FAILED)
        if found is ReloadResult.RELOADED:
            _log.info("renewed: %s", files)
