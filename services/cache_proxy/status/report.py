"""The data of the status page, served as `/status.json`. None means unknown."""

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
# This takes a millisecond.
_CHUNK_REPORTS = 50

Scope = Literal["fleet", "not shared", "redis lost", "redis slow"]
"""Which replicas the report is about: all, or this one alone for the given reason."""


class IntervalCounts(Interval, array_like=False):
    """An interval that is encoded with the names of its fields."""

    @classmethod
    def from_interval(cls, interval: Interval) -> "IntervalCounts":
        """Convert an interval."""
        return cls(*msgspec.structs.astuple(interval))


class QueueRow(msgspec.Struct):
    """The waiting pairs of a priority, and the expected wait of a pair that is enqueued now."""

    priority: str
    waiting: int | None
    wait_seconds: float | None


class FailureInfo(msgspec.Struct):
    """The last failure: the name of an exception or of a gRPC status, and how long ago it was."""

    kind: str
    seconds_ago: float


class StoreStatus(msgspec.Struct):
    """The store as this replica sees it. `kind` is the scheme of `--cache-url`."""

    kind: str
    state: Literal["ok", "refuses", "down"]
    last_failure: FailureInfo | None = None


class ModelStatus(msgspec.Struct):
    """The state of the model. `down` means that new pairs are rejected until the next retry."""

    state: Literal["ok", "failing", "down", "unknown"]
    failures_in_a_row: int | None
    next_call_seconds: float | None
    last_failure: FailureInfo | None = None


class ModelUtilization(msgspec.Struct):
    """The used share of the rate limit, 0 to 1.

    `taken` is that of calls or of pairs, whichever is larger; `filled` is that of pairs alone.
    """

    taken: float
    filled: float


class CallerRow(msgspec.Struct):
    """One of the busiest callers."""

    name: str
    pairs: int
    hits: int
    misses: int
    failed: int


class StatusReport(msgspec.Struct):
    """The whole report. Counts are those of the last ten minutes. `slot_use` is None without a rate limit."""

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
    """What this replica knows of itself."""

    replica: str
    store: StoreStatus
    up_seconds: float


async def fleet_report(snapshot: QueueSnapshot, replica: ReplicaInfo) -> StatusReport:
    """Make the report of all replicas, in chunks so that hundreds of them do not block the event loop."""
    aggregator = WindowAggregator(now_seconds=snapshot.now_seconds)
    unreadable = 0
    async for chunk in iter_chunks(snapshot.reports or (), _CHUNK_REPORTS):
        for number, encoded in chunk:
            minute = decode_report(encoded)
            if minute is None:
                unreadable += 1
            else:
                aggregator.add(number, minute)
    totals = aggregator.totals()
    return _build_report(
        "fleet", snapshot, replica, totals, now_seconds=snapshot.now_seconds, unreadable=unreadable
    )


def replica_report(
    scope: Scope,
    snapshot: QueueSnapshot | None,
    replica: ReplicaInfo,
    minutes: list[tuple[int, MinuteReport]],
    *,
    now_seconds: float,
) -> StatusReport:
    """Make the report of this replica alone. Without a snapshot, the state of the queue is unknown."""
    return _build_report(
        scope, snapshot, replica, aggregate(minutes, now_seconds=now_seconds), now_seconds=now_seconds
    )


def failure_info(failure: tuple[str, float] | None) -> FailureInfo | None:
    """Convert a failure whose time is on `time.monotonic`."""
    return None if failure is None else FailureInfo(failure[0], max(0.0, time.monotonic() - failure[1]))


def _build_report(
    scope: Scope,
    snapshot: QueueSnapshot | None,
    replica: ReplicaInfo,
    totals: WindowTotals,
    *,
    now_seconds: float,
    unreadable: int = 0,
) -> StatusReport:
    total = totals.total
    batch_pairs = snapshot.batch_pairs if snapshot else None
    answered = total.pairs - total.failed
    # Without the proxy, the same requests would have needed at least a call each, and full batches.
    needed = max(total.requests, -(-answered // batch_pairs)) if batch_pairs else total.requests
    return StatusReport(
        scope=scope,
        at_seconds=now_seconds,
        up_seconds=replica.up_seconds,
        replica=replica.replica,
        version=version("seniority-cache"),
        live_replicas=snapshot.live_replicas if snapshot else None,
        silent_replicas=snapshot.silent_replicas if snapshot else None,
        total=IntervalCounts.from_interval(total),
        hit_rate=total.hits / total.pairs if total.pairs else None,
        calls_needed=needed,
        calls_saved=max(0, needed - total.calls),
        batch_pairs=batch_pairs,
        slot_use=_utilization(totals.intervals, snapshot, intervals_each=1),
        slot_use_minute=_last_or_none(
            _utilization(
                _merge(totals.intervals[-_MINUTE_INTERVALS - 1 : -1]),
                snapshot,
                intervals_each=_MINUTE_INTERVALS,
            )
        ),
        slot_use_window=_last_or_none(_utilization([total], snapshot, intervals_each=len(totals.intervals))),
        spans=[IntervalCounts.from_interval(interval) for interval in totals.intervals],
        queue=[
            QueueRow(
                priority,
                snapshot.waiting[priority] if snapshot else None,
                snapshot.wait_seconds(priority) if snapshot else None,
            )
            for priority in PRIORITY_CLASSES
        ],
        store=replica.store,
        model=_model_status(snapshot, totals),
        callers=[_caller_row(caller) for caller in totals.callers],
        unreadable_reports=unreadable,
    )


def _caller_row(totals: CallerTotals) -> CallerRow:
    return CallerRow(totals.name, totals.pairs, totals.hits, totals.misses, totals.failed)


def _model_status(snapshot: QueueSnapshot | None, totals: WindowTotals) -> ModelStatus:
    last = None
    if totals.last_failure is not None and totals.last_failure_seconds is not None:
        last = FailureInfo(totals.last_failure, totals.last_failure_seconds)
    failures = snapshot.failures_in_a_row if snapshot else None
    if snapshot is None or failures is None:
        return ModelStatus("unknown", None, None, last)
    state: Literal["ok", "failing", "down"] = "failing" if failures else "ok"
    if snapshot.is_down:
        state = "down"
    return ModelStatus(state, failures, snapshot.next_call_seconds, last)


def _utilization(
    intervals: list[Interval], snapshot: QueueSnapshot | None, *, intervals_each: int
) -> list[ModelUtilization] | None:
    """Return the utilization of the model in each interval.

    Each interval stands for `intervals_each` times ten seconds. None if there is no rate limit, or it is
    unknown.
    """
    if snapshot is None or snapshot.pairs_per_second is None or snapshot.calls_per_second is None:
        return None
    pairs_rate = snapshot.pairs_per_second
    calls_rate = snapshot.calls_per_second
    # The rate in pairs that the limit on calls allows. A rate of 0 means no limit.
    rate_by_calls = calls_rate * (snapshot.batch_pairs or 0)
    max_pairs_rate = min(pairs_rate or rate_by_calls, rate_by_calls or pairs_rate)
    if not max_pairs_rate:
        return None
    seconds = INTERVAL_SECONDS * intervals_each
    utilization = []
    for interval in intervals:
        filled = min(1.0, interval.sent / (max_pairs_rate * seconds))
        calls = interval.calls / (calls_rate * seconds) if calls_rate else 0.0
        utilization.append(ModelUtilization(taken=min(1.0, max(filled, calls)), filled=filled))
    return utilization


def _merge(intervals: list[Interval]) -> list[Interval]:
    total = Interval()
    for interval in intervals:
        total.add(interval)
    return [total]


def _last_or_none(utilization: list[ModelUtilization] | None) -> ModelUtilization | None:
    return utilization[-1] if utilization else None
