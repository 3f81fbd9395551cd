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

from services.cache_proxy.model.client import REFUSALS
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.snapshot import MAX_REPORT_BYTES, Report
from services.cache_proxy.status.rolling_window import (
    MINUTE_SECONDS,
    SPAN_SECONDS,
    WINDOW_MINUTES,
    Minute,
    Span,
    callers_of,
    encode,
)

_log = logging.getLogger(__name__)

_SAMPLE_SECONDS = 1.0
_REPORT_SECONDS = 1.0
_AT_ONCE = 3
_NO_FAILURES = {"OK", "CANCELLED"} | {code.name for code in REFUSALS}


@dataclass(slots=True)
class _Totals:
    """The metrics at a moment."""

    span: Span = field(default_factory=Span)
    callers: Mapping[str, Counter[str]] = field(default_factory=dict)
    failed_calls: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Counting:
    """A minute under way, with all its callers, and as it is reported."""

    minute: Minute = field(default_factory=Minute)
    callers: dict[str, Counter[str]] = field(default_factory=dict)
    report: bytes = b""


class Ledger:
    """State: `_minutes`, those of the window; `_before`, the metrics as they were last read; `_reported`,
    what Redis has of each minute; `_looked_at`, when `due` last looked; the clock. Event loop only.

    Minutes are counted on Redis's clock as soon as that was heard, so those of all replicas are the same.
    """  # noqa: D205 - one thought

    def __init__(self, metrics: ProxyMetrics) -> None:
        self._metrics = metrics
        self._minutes: dict[int, _Counting] = {}
        self._before = _Totals()
        self._reported: dict[int, bytes] = {}
        self._looked_at = 0.0
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
            await asyncio.sleep(_SAMPLE_SECONDS)

    def sample(self) -> None:
        """Count what came since the last time to the ten seconds that are now."""
        totals, before = self._totals(), self._before
        self._before = totals
        span = Span(
            *(getattr(totals.span, name) - getattr(before.span, name) for name in Span.__struct_fields__)
        )
        if span == Span():
            return
        now = self.now_seconds
        counting = self._minute(int(now // MINUTE_SECONDS))
        counting.minute.spans[int(now % MINUTE_SECONDS // SPAN_SECONDS)].add(span)
        for name, counts in totals.callers.items():
            more = counts - before.callers.get(name, Counter())
            if more:
                counting.callers.setdefault(name, Counter()).update(more)
        counting.minute.callers = callers_of(counting.callers)
        for code, count in totals.failed_calls.items():
            if count > before.failed_calls.get(code, 0):
                counting.minute.last_failure = code
        counting.report = encode(counting.minute)

    def minutes(self) -> list[tuple[int, Minute]]:
        """Those of the window, by their number."""
        self.sample()
        return [(number, counting.minute) for number, counting in self._minutes.items()]

    def due(self) -> Sequence[Report]:
        """See `Reporter.due`: the newest minutes first, once a second at the most."""
        now = time.monotonic()
        if now - self._looked_at < _REPORT_SECONDS:
            return []
        self._looked_at = now
        self._forget_old()
        new = [
            (number, counting.report)
            for number, counting in sorted(self._minutes.items(), key=lambda item: -item[0])
            if counting.report != self._reported.get(number) and len(counting.report) <= MAX_REPORT_BYTES
        ]
        return new[:_AT_ONCE]

    def reported(self, reports: Sequence[Report], *, clock_offset_seconds: float) -> None:
        """See `Reporter.reported`."""
        self._reported.update(reports)
        self._clock_offset_seconds = clock_offset_seconds

    def report_again(self) -> None:
        """See `Reporter.report_again`."""
        self._reported.clear()

    def _minute(self, number: int) -> _Counting:
        if number not in self._minutes:
            self._minutes[number] = _Counting()
            self._forget_old()
        return self._minutes[number]

    def _forget_old(self) -> None:
        this = int(self.now_seconds // MINUTE_SECONDS)
        for number in [number for number in self._minutes if not this - WINDOW_MINUTES < number <= this]:
            del self._minutes[number]
            self._reported.pop(number, None)

    def _totals(self) -> _Totals:
        rpcs, pairs = self._metrics.rpcs, self._metrics.rpcs.pairs
        calls = _by_code(self._metrics.model_calls)
        failed_calls = {code: count for code, count in calls.items() if code not in _NO_FAILURES}
        [sent] = _values(self._metrics.model_pairs)
        return _Totals(
            Span(
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


def _values(metric: Metric) -> list[tuple[dict[str, str], float]]:
    [family] = metric.collect()
    return [(sample.labels, sample.value) for sample in family.samples if sample.name.endswith("_total")]


def _by_code(metric: Metric) -> dict[str, int]:
    return {labels["code"]: int(value) for labels, value in _values(metric)}
