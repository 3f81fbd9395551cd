"""Sample this replica's metrics once a second, and report them to the other replicas by the minute.

The counts of the status page are differences of the metrics, so requests have no extra cost.
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
from services.cache_proxy.queue.snapshot import MAX_REPORT_BYTES, Report, ReportSource
from services.cache_proxy.status.rolling_window import (
    INTERVAL_SECONDS,
    MINUTE_SECONDS,
    WINDOW_MINUTES,
    Interval,
    MinuteReport,
    busiest_callers,
    encode_report,
)
from services.common.compat import override

_log = logging.getLogger(__name__)

_SAMPLE_INTERVAL_SECONDS = 1.0
_REPORT_INTERVAL_SECONDS = 1.0
_MAX_REPORTS = 3
_SUCCESS_CODES = {"OK", "CANCELLED"} | {code.name for code in REJECTION_CODES}


@dataclass(slots=True)
class _Sample:
    """The values of the metrics at one moment."""

    interval: Interval = field(default_factory=Interval)
    callers: Mapping[str, Counter[str]] = field(default_factory=dict)
    failed_calls: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _MinuteInProgress:
    """A minute that is still being counted, with all its callers, and its encoded report."""

    minute_report: MinuteReport = field(default_factory=MinuteReport)
    callers: dict[str, Counter[str]] = field(default_factory=dict)
    encoded_report: bytes = b""


class MetricsSampler(ReportSource):
    """Counts the last ten minutes of this replica.

    State (event loop only):

    - `_minutes`: the counts of each minute, by its number since 1970.
    - `_last_sample`: the metrics when they were last read.
    - `_reported`: the report of each minute that Redis has.
    - `_last_pending_at`: when `pending_reports` last returned any.
    - `_clock_offset_seconds`: the clock of Redis less `time.monotonic`.

    Minutes are those of Redis's clock as soon as it is known, so they are the same for all replicas.
    """

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        self._minutes: dict[int, _MinuteInProgress] = {}
        self._last_sample = _Sample()
        self._reported: dict[int, bytes] = {}
        self._last_pending_at = 0.0
        self._clock_offset_seconds = time.time() - time.monotonic()

    @property
    def now_seconds(self) -> float:
        """Return the Unix time, by Redis's clock if it is known."""
        return time.monotonic() + self._clock_offset_seconds

    async def run(self) -> None:
        """Sample the metrics once a second until cancelled."""
        while True:
            try:
                self.sample()
            except Exception:  # noqa: BLE001 - a defect here must not stop the proxy
                _log.exception("the figures of the status page cannot be counted")
            await asyncio.sleep(_SAMPLE_INTERVAL_SECONDS)

    def sample(self) -> None:
        """Add what the metrics counted since the last sample to the current interval."""
        sample = self._read_metrics()
        before = self._last_sample
        self._last_sample = sample
        interval = Interval(
            *(
                getattr(sample.interval, name) - getattr(before.interval, name)
                for name in Interval.__struct_fields__
            )
        )
        if interval == Interval():
            return
        now = self.now_seconds
        minute = self._get_minute(int(now // MINUTE_SECONDS))
        minute.minute_report.intervals[int(now % MINUTE_SECONDS // INTERVAL_SECONDS)].add(interval)
        for name, counts in sample.callers.items():
            increase = counts - before.callers.get(name, Counter())
            if increase:
                minute.callers.setdefault(name, Counter()).update(increase)
        minute.minute_report.callers = busiest_callers(minute.callers)
        for code, count in sample.failed_calls.items():
            if count > before.failed_calls.get(code, 0):
                minute.minute_report.last_failure = code
        minute.encoded_report = encode_report(minute.minute_report)

    def minutes(self) -> list[tuple[int, MinuteReport]]:
        """Return the reports of the last ten minutes, each with the number of its minute."""
        self.sample()
        return [(number, minute.minute_report) for number, minute in self._minutes.items()]

    @override
    def pending_reports(self) -> Sequence[Report]:
        # The newest minutes first, and at most once a second.
        now = time.monotonic()
        if now - self._last_pending_at < _REPORT_INTERVAL_SECONDS:
            return []
        self._last_pending_at = now
        self._drop_expired()
        pending = [
            (number, minute.encoded_report)
            for number, minute in sorted(self._minutes.items(), key=lambda item: -item[0])
            if minute.encoded_report != self._reported.get(number)
            and len(minute.encoded_report) <= MAX_REPORT_BYTES
        ]
        return pending[:_MAX_REPORTS]

    @override
    def mark_reported(self, reports: Sequence[Report], *, clock_offset_seconds: float) -> None:
        self._reported.update(reports)
        self._clock_offset_seconds = clock_offset_seconds

    @override
    def resend_all(self) -> None:
        self._reported.clear()

    def _get_minute(self, number: int) -> _MinuteInProgress:
        if number not in self._minutes:
            self._minutes[number] = _MinuteInProgress()
            self._drop_expired()
        return self._minutes[number]

    def _drop_expired(self) -> None:
        current = int(self.now_seconds // MINUTE_SECONDS)
        first = current - WINDOW_MINUTES + 1
        for number in [number for number in self._minutes if not first <= number <= current]:
            del self._minutes[number]
            self._reported.pop(number, None)

    def _read_metrics(self) -> _Sample:
        rpcs = self._metrics.rpcs
        pairs = rpcs.pairs
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
