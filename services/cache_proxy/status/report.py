"""What the status page tells, as data: `/status.json`. None is unknown."""

import time
from importlib.metadata import version
from typing import Literal

import msgspec

from services.cache_proxy.domain import PRIORITY_CLASSES
from services.cache_proxy.queue.snapshot import QueueSnapshot
from services.cache_proxy.status.rolling_window import (
    INTERVAL_SECONDS,
    WINDOW_SECONDS,
    CallerTotals,
    Interval,
    MinuteReport,
    WindowAggregator,
    WindowTotals,
    aggregate,
    decode_report,
)
from services.common.checkpoint import iter_chunks

_MINUTE_INTERVALS = 6
_CHUNK_REPORTS = 50  # a millisecond

Scope = Literal["fleet", "not shared", "redis lost", "redis slow"]
"""Of whom the figures are: of all replicas; else of this one alone, and why."""


class IntervalCounts(Interval, array_like=False):
    """A span by the names of its figures."""

    @classmethod
    def from_interval(cls, interval: Interval) -> "IntervalCounts":
        """The same figures."""
        return cls(*msgspec.structs.astuple(interval))


class QueueRow(msgspec.Struct):
    """Pairs of a priority that wait, and how long one that comes now would, at the end of them."""

    priority: str
    waiting: int | None
    wait_seconds: float | None


class FailureInfo(msgspec.Struct):
    """The last one: its kind (an exception's name, or a gRPC status), and how long ago."""

    kind: str
    seconds_ago: float


class StoreStatus(msgspec.Struct):
    """The cache as this replica sees it; `kind` is the scheme of `--cache-url`."""

    kind: str
    state: Literal["ok", "refuses", "down"]
    last_failure: FailureInfo | None = None


class ModelStatus(msgspec.Struct):
    """`down`: so many calls failed in a row that new pairs are refused until the next try."""

    state: Literal["ok", "failing", "down", "unknown"]
    failures_in_a_row: int | None
    next_call_seconds: float | None
    last_failure: FailureInfo | None = None


class ModelUtilization(msgspec.Struct):
    """A share of the limit, 0 to 1: of calls or pairs, whichever is scarcer, and of pairs alone."""

    taken: float
    filled: float


class CallerRow(msgspec.Struct):
    """One of those that asked most."""

    name: str
    pairs: int
    hits: int
    misses: int
    failed: int


class StatusReport(msgspec.Struct):
    """All of it. Counts are those of the window; `slot_use` is None where nothing limits calls."""

    scope: Scope
    at_seconds: float
    up_seconds: float
    replica: str
    version: str
    live_replicas: int | None
    silent_replicas: int | None
    total: IntervalCounts
    hit_rate: float | None
    calls_needed: int
    calls_saved: int
    batch_pairs: int | None
    slot_use: list[ModelUtilization] | None
    slot_use_minute: ModelUtilization | None
    slot_use_window: ModelUtilization | None
    spans: list[IntervalCounts]
    queue: list[QueueRow]
    store: StoreStatus
    model: ModelStatus
    callers: list[CallerRow]
    unreadable_reports: int
    window_seconds: int = WINDOW_SECONDS
    span_seconds: int = INTERVAL_SECONDS


class ReplicaInfo(msgspec.Struct, frozen=True):
    """This replica, as it knows itself."""

    replica: str
    store: StoreStatus
    up_seconds: float


async def fleet_report(overview: QueueSnapshot, replica: ReplicaInfo) -> StatusReport:
    """From what Redis says; of hundreds of replicas a little at a time."""
    summing, unreadable = WindowAggregator(now_seconds=overview.now_seconds), 0
    async for some in iter_chunks(overview.reports or (), _CHUNK_REPORTS):
        for number, report in some:
            minute = decode_report(report)
            if minute is None:
                unreadable += 1
            else:
                summing.add(number, minute)
    sums = summing.totals()
    return _build_report(
        "fleet", overview, replica, sums, now_seconds=overview.now_seconds, unreadable=unreadable
    )


def replica_report(
    scope: Scope,
    overview: QueueSnapshot | None,
    replica: ReplicaInfo,
    minutes: list[tuple[int, MinuteReport]],
    *,
    now_seconds: float,
) -> StatusReport:
    """From this replica's own minutes; without an overview nothing is known of the queue."""
    return _build_report(
        scope, overview, replica, aggregate(minutes, now_seconds=now_seconds), now_seconds=now_seconds
    )


def failure_info(failure: tuple[str, float] | None) -> FailureInfo | None:
    """A failure on time.monotonic."""
    return None if failure is None else FailureInfo(failure[0], max(0.0, time.monotonic() - failure[1]))


def _build_report(
    scope: Scope,
    overview: QueueSnapshot | None,
    replica: ReplicaInfo,
    totals: WindowTotals,
    *,
    now_seconds: float,
    unreadable: int = 0,
) -> StatusReport:
    total, batch_pairs = totals.total, overview.batch_pairs if overview else None
    answered = total.pairs - total.failed
    # What the same requests would have cost at the model itself: a call each, and full calls, at least.
    needed = max(total.requests, -(-answered // batch_pairs)) if batch_pairs else total.requests
    return StatusReport(
        scope=scope,
        at_seconds=now_seconds,
        up_seconds=replica.up_seconds,
        replica=replica.replica,
        version=version("seniority-cache"),
        live_replicas=overview.live_replicas if overview else None,
        silent_replicas=overview.silent_replicas if overview else None,
        total=IntervalCounts.from_interval(total),
        hit_rate=total.hits / total.pairs if total.pairs else None,
        calls_needed=needed,
        calls_saved=max(0, needed - total.calls),
        batch_pairs=batch_pairs,
        slot_use=_utilization(totals.intervals, overview, intervals_each=1),
        slot_use_minute=_last_or_none(
            _utilization(
                _merge(totals.intervals[-_MINUTE_INTERVALS - 1 : -1]),
                overview,
                intervals_each=_MINUTE_INTERVALS,
            )
        ),
        slot_use_window=_last_or_none(_utilization([total], overview, intervals_each=len(totals.intervals))),
        spans=[IntervalCounts.from_interval(span) for span in totals.intervals],
        queue=[
            QueueRow(
                lane,
                overview.waiting[lane] if overview else None,
                overview.wait_seconds(lane) if overview else None,
            )
            for lane in PRIORITY_CLASSES
        ],
        store=replica.store,
        model=_model_status(overview, totals),
        callers=[_caller_row(caller) for caller in totals.callers],
        unreadable_reports=unreadable,
    )


def _caller_row(totals: CallerTotals) -> CallerRow:
    return CallerRow(totals.name, totals.pairs, totals.hits, totals.misses, totals.failed)


def _model_status(overview: QueueSnapshot | None, totals: WindowTotals) -> ModelStatus:
    last = None
    if totals.last_failure is not None and totals.last_failure_seconds is not None:
        last = FailureInfo(totals.last_failure, totals.last_failure_seconds)
    failures = overview.failures_in_a_row if overview else None
    if overview is None or failures is None:
        return ModelStatus("unknown", None, None, last)
    state: Literal["ok", "failing", "down"] = "failing" if failures else "ok"
    if overview.is_down:
        state = "down"
    return ModelStatus(state, failures, overview.next_call_seconds, last)


def _utilization(
    intervals: list[Interval], overview: QueueSnapshot | None, *, intervals_each: int
) -> list[ModelUtilization] | None:
    """Of spans that are each so many times ten seconds. None if there is no limit, or none is known."""
    if overview is None or overview.pairs_per_second is None or overview.calls_per_second is None:
        return None
    pairs_rate, calls_rate = overview.pairs_per_second, overview.calls_per_second
    by_calls = calls_rate * (overview.batch_pairs or 0)
    most_pairs = min(rate for rate in (pairs_rate or by_calls, by_calls or pairs_rate))
    if not most_pairs:
        return None
    seconds = INTERVAL_SECONDS * intervals_each
    use = []
    for span in intervals:
        filled = min(1.0, span.sent / (most_pairs * seconds))
        calls = span.calls / (calls_rate * seconds) if calls_rate else 0.0
        use.append(ModelUtilization(taken=min(1.0, max(filled, calls)), filled=filled))
    return use


def _merge(intervals: list[Interval]) -> list[Interval]:
    total = Interval()
    for span in intervals:
        total.add(span)
    return [total]


def _last_or_none(use: list[ModelUtilization] | None) -> ModelUtilization | None:
    return use[-1] if use else None
