"""Reload changed files once a second, and record the outcome in the metrics and the log."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Protocol

from prometheus_client import Counter, Gauge

from services.common.file_reload import ReloadResult

_INTERVAL_SECONDS = 1.0
_log = logging.getLogger(__name__)


class ReloadMetrics(Protocol):
    """The metrics that record reloads, both labelled by the name of the files."""

    reloads: Counter
    reload_failing: Gauge


class FileReloader:
    """Call every check for changed files once a second.

    State: `_checks`, complete before `run` starts.
    """

    def __init__(self, metrics: ReloadMetrics) -> None:
        self._metrics = metrics
        self._checks: list[Callable[[], object]] = []

    def add(self, check: Callable[[], object]) -> None:
        """Call `check` once a second while `run` runs."""
        self._checks.append(check)

    def on_reload(self, files: str) -> Callable[[ReloadResult], None]:
        """Return a callback that records each reload of these files, one of `RELOADABLE_FILES`."""
        return partial(self._record, files)

    async def run(self) -> None:
        """Run all checks once a second until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_SECONDS)
            for check in self._checks:
                check()

    def _record(self, files: str, result: ReloadResult) -> None:
        self._metrics.reloads.labels(files, result.value).inc()
        self._metrics.reload_failing.labels(files).set(result is ReloadResult.FAILED)
        if result is ReloadResult.RELOADED:
            _log.info("renewed: %s", files)
