"""This replica's figures by the minute: read off its metrics once a second, and reported to the others.

Nothing is counted twice, and no request pays for it: `RpcMetrics` and the model's counters are what they are.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import Counter as Metric

from services.cache_proxy.model.responses import REJECTION_CODES
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.snapshot import MAX_REPORT_BYTES, Report
from services.cache_proxy.status.rolling_window import (
    INTERVAL_SECONDS,
    MINUTE_SECONDS,
    WINDOW_MINUTES,
    Interval,
    MinuteReport,
    busiest_callers,
    encode_report,
)

_log = logging.getLogger(__name__)

_SAMPLE_INTERVAL_SECONDS = 1.0
_REPORT_INTERVAL_SECONDS = 1.0
_MAX_REPORTS = 3
_SUCCESS_CODES = {"OK", "CANCELLED"} | {code.name for code in REJECTION_CODES}


@dataclass(slots=True)
class _Sample:
    """The metrics at a moment."""

    interval: Interval = field(default_factory=Interval)
    callers: Mapping[str, Counter[str]] = field(default_factory=dict)
    failed_calls: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _MinuteInProgress:
    """A minute under way, with all its callers, and as it is reported."""

    minute_report: MinuteReport = field(default_factory=MinuteReport)
    callers: dict[str, Counter[str]] = field(default_factory=dict)
    encoded_report: bytes = b""


class MetricsSampler:
    """State: `_minutes`, those of the window; `_before`, the metrics as they were last read; `_reported`,
    what Redis has of each minute; `_looked_at`, when `due` last looked; the clock. Event loop only.

    Minutes are counted on Redis's clock as soon as that was heard, so those of all replicas are the same.
    """  # noqa: D205 - one thought

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        self._minutes: dict[int, _MinuteInProgress] = {}
        self._last_sample = _Sample()
        self._reported: dict[int, bytes] = {}
        self._last_pending_at = 0.0
        self._clock_offset_seconds = time.time() - time.monotonic()

    @property
    def now_seconds(self) -> float:
        """Unix time, by Redis's clock if that was heard."""
        return time.monotonic() + self._clock_offset_seconds

    async def run(self) -> None:
        """Read the metrics once a second, until cancelled."""
        while True:
            try:
                self.sample()
            except Exception:  # noqa: BLE001 - a defect costs figures, never an answer to a caller
                _log.exception("the figures of the status page cannot be counted")
            await asyncio.sleep(_SAMPLE_INTERVAL_SECONDS)

    def sample(self) -> None:
        """Count what came since the last time to the ten seconds that are now."""
        totals, before = self._read_metrics(), self._last_sample
        self._last_sample = totals
        span = Interval(
            *(
                getattr(totals.interval, name) - getattr(before.interval, name)
                for name in Interval.__struct_fields__
            )
        )
        if span == Interval():
            return
        now = self.now_seconds
        counting = self._get_minute(int(now // MINUTE_SECONDS))
        counting.minute_report.intervals[int(now % MINUTE_SECONDS // INTERVAL_SECONDS)].add(span)
        for name, counts in totals.callers.items():
            more = counts - before.callers.get(name, Counter())
            if more:
                counting.callers.setdefault(name, Counter()).update(more)
        counting.minute_report.callers = busiest_callers(counting.callers)
        for code, count in totals.failed_calls.items():
            if count > before.failed_calls.get(code, 0):
                counting.minute_report.last_failure = code
        counting.encoded_report = encode_report(counting.minute_report)

    def minutes(self) -> list[tuple[int, MinuteReport]]:
        """Those of the window, by their number."""
        self.sample()
        return [(number, counting.minute_report) for number, counting in self._minutes.items()]

    def pending_reports(self) -> Sequence[Report]:
        """See `Reporter.due`: the newest minutes first, once a second at the most."""
        now = time.monotonic()
        if now - self._last_pending_at < _REPORT_INTERVAL_SECONDS:
            return []
        self._last_pending_at = now
        self._drop_expired()
        new = [
            (number, counting.encoded_report)
            for number, counting in sorted(self._minutes.items(), key=lambda item: -item[0])
            if counting.encoded_report != self._reported.get(number)
            and len(counting.encoded_report) <= MAX_REPORT_BYTES
        ]
        return new[:_MAX_REPORTS]

    def mark_reported(self, reports: Sequence[Report], *, clock_offset_seconds: float) -> None:
        """See `Reporter.reported`."""
        self._reported.update(reports)
        self._clock_offset_seconds = clock_offset_seconds

    def resend_all(self) -> None:
        """See `Reporter.report_again`."""
        self._reported.clear()

    def _get_minute(self, number: int) -> _MinuteInProgress:
        if number not in self._minutes:
            self._minutes[number] = _MinuteInProgress()
            self._drop_expired()
        return self._minutes[number]

    def _drop_expired(self) -> None:
        this = int(self.now_seconds // MINUTE_SECONDS)
        for number in [number for number in self._minutes if not this - WINDOW_MINUTES < number <= this]:
            del self._minutes[number]
            self._reported.pop(number, None)

    def _read_metrics(self) -> _Sample:
        rpcs, pairs = self._metrics.rpcs, self._metrics.rpcs.pairs
        calls = _counts_by_code(self._metrics.model_calls)
        failed_calls = {code: count for code, count in calls.items() if code not in _SUCCESS_CODES}
        [sent] = _counter_values(self._metrics.model_pairs)
        return _Sample(
            Interval(
                requests=rpcs.requests["OK"],
                hits=pairs["l1"] + pairs["l2"] + pairs["stale"],
                coalesced=pairs["coalesced"],
                inferred=pairs["inferred"],
                failed=pairs["failed"],
                calls=sum(calls.values()),
                failed_calls=sum(failed_calls.values()),
                sent=int(sent[1]),
            ),
            {caller: counts.copy() for caller, counts in rpcs.caller_pairs.items()},
            failed_calls,
        )


def _counter_values(metric: Metric) -> list[tuple[dict[str, str], float]]:
    [family] = metric.collect()
    return [(sample.labels, sample.value) for sample in family.samples if sample.name.endswith("_total")]


def _counts_by_code(metric: Metric) -> dict[str, int]:
    return {labels["code"]: int(value) for labels, value in _counter_values(metric)}
