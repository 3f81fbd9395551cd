"""What the status page tells, as data: `/status.json`. None is unknown."""

import time
from importlib.metadata import version
from typing import Literal

import msgspec

from services.cache_proxy.observability.metrics import LANES
from services.cache_proxy.queue.snapshot import Overview
from services.cache_proxy.status.rolling_window import (
    SPAN_SECONDS,
    WINDOW_SECONDS,
    CallerCounts,
    Minute,
    Span,
    Summing,
    Sums,
    decode,
    sum_up,
)
from services.common.checkpoint import in_breaths

_MINUTE_SPANS = 6
_BREATH_REPORTS = 50  # a millisecond

Scope = Literal["fleet", "not shared", "redis lost", "redis slow"]
"""Of whom the figures are: of all replicas; else of this one alone, and why."""


class Counts(Span, array_like=False):
    """A span by the names of its figures."""

    @classmethod
    def of(cls, span: Span) -> "Counts":
        """The same figures."""
        return cls(*msgspec.structs.astuple(span))


class Lane(msgspec.Struct):
    """Pairs of a priority that wait, and how long one that comes now would, at the end of them."""

    priority: str
    waiting: int | None
    wait_seconds: float | None


class Failure(msgspec.Struct):
    """The last one: its kind (an exception's name, or a gRPC status), and how long ago."""

    kind: str
    seconds_ago: float


class Store(msgspec.Struct):
    """The cache as this replica sees it; `kind` is the scheme of `--cache-url`."""

    kind: str
    state: Literal["ok", "refuses", "down"]
    last_failure: Failure | None = None


class Model(msgspec.Struct):
    """`down`: so many calls failed in a row that new pairs are refused until the next try."""

    state: Literal["ok", "failing", "down", "unknown"]
    failures_in_a_row: int | None
    next_call_seconds: float | None
    last_failure: Failure | None = None


class SlotUse(msgspec.Struct):
    """A share of the limit, 0 to 1: of calls or pairs, whichever is scarcer, and of pairs alone."""

    taken: float
    filled: float


class Caller(msgspec.Struct):
    """One of those that asked most."""

    name: str
    pairs: int
    hits: int
    misses: int
    failed: int


class Figures(msgspec.Struct):
    """All of it. Counts are those of the window; `slot_use` is None where nothing limits calls."""

    scope: Scope
    at_seconds: float
    up_seconds: float
    replica: str
    version: str
    live_replicas: int | None
    silent_replicas: int | None
    total: Counts
    hit_rate: float | None
    calls_needed: int
    calls_saved: int
    batch_pairs: int | None
    slot_use: list[SlotUse] | None
    slot_use_minute: SlotUse | None
    slot_use_window: SlotUse | None
    spans: list[Counts]
    queue: list[Lane]
    store: Store
    model: Model
    callers: list[Caller]
    unreadable_reports: int
    window_seconds: int = WINDOW_SECONDS
    span_seconds: int = SPAN_SECONDS


class Self(msgspec.Struct, frozen=True):
    """This replica, as it knows itself."""

    replica: str
    store: Store
    up_seconds: float


async def of_fleet(overview: Overview, own: Self) -> Figures:
    """From what Redis says; of hundreds of replicas a little at a time."""
    summing, unreadable = Summing(now_seconds=overview.now_seconds), 0
    async for some in in_breaths(overview.reports or (), _BREATH_REPORTS):
        for number, report in some:
            minute = decode(report)
            if minute is None:
                unreadable += 1
            else:
                summing.add(number, minute)
    sums = summing.sums()
    return _figures("fleet", overview, own, sums, now_seconds=overview.now_seconds, unreadable=unreadable)


def of_replica(
    scope: Scope,
    overview: Overview | None,
    own: Self,
    minutes: list[tuple[int, Minute]],
    *,
    now_seconds: float,
) -> Figures:
    """From this replica's own minutes; without an overview nothing is known of the queue."""
    return _figures(scope, overview, own, sum_up(minutes, now_seconds=now_seconds), now_seconds=now_seconds)


def ago(failure: tuple[str, float] | None) -> Failure | None:
    """A failure on time.monotonic."""
    return None if failure is None else Failure(failure[0], max(0.0, time.monotonic() - failure[1]))


def _figures(
    scope: Scope, overview: Overview | None, own: Self, sums: Sums, *, now_seconds: float, unreadable: int = 0
) -> Figures:
    total, batch_pairs = sums.total, overview.batch_pairs if overview else None
    answered = total.pairs - total.failed
    # What the same requests would have cost at the model itself: a call each, and full calls, at least.
    needed = max(total.requests, -(-answered // batch_pairs)) if batch_pairs else total.requests
    return Figures(
        scope=scope,
        at_seconds=now_seconds,
        up_seconds=own.up_seconds,
        replica=own.replica,
        version=version("seniority-cache"),
        live_replicas=overview.live_replicas if overview else None,
        silent_replicas=overview.silent_replicas if overview else None,
        total=Counts.of(total),
        hit_rate=total.hits / total.pairs if total.pairs else None,
        calls_needed=needed,
        calls_saved=max(0, needed - total.calls),
        batch_pairs=batch_pairs,
        slot_use=_slot_use(sums.spans, overview, each=1),
        slot_use_minute=_last(
            _slot_use(_sums(sums.spans[-_MINUTE_SPANS - 1 : -1]), overview, each=_MINUTE_SPANS)
        ),
        slot_use_window=_last(_slot_use([total], overview, each=len(sums.spans))),
        spans=[Counts.of(span) for span in sums.spans],
        queue=[
            Lane(
                lane,
                overview.waiting[lane] if overview else None,
                overview.wait_seconds(lane) if overview else None,
            )
            for lane in LANES
        ],
        store=own.store,
        model=_model(overview, sums),
        callers=[_caller(caller) for caller in sums.callers],
        unreadable_reports=unreadable,
    )


def _caller(counts: CallerCounts) -> Caller:
    return Caller(counts.name, counts.pairs, counts.hits, counts.misses, counts.failed)


def _model(overview: Overview | None, sums: Sums) -> Model:
    last = None
    if sums.last_failure is not None and sums.last_failure_seconds is not None:
        last = Failure(sums.last_failure, sums.last_failure_seconds)
    failures = overview.failures_in_a_row if overview else None
    if overview is None or failures is None:
        return Model("unknown", None, None, last)
    state: Literal["ok", "failing", "down"] = "failing" if failures else "ok"
    if overview.is_down:
        state = "down"
    return Model(state, failures, overview.next_call_seconds, last)


def _slot_use(spans: list[Span], overview: Overview | None, *, each: int) -> list[SlotUse] | None:
    """Of spans that are each so many times ten seconds. None if there is no limit, or none is known."""
    if overview is None or overview.pairs_per_second is None or overview.calls_per_second is None:
        return None
    pairs_rate, calls_rate = overview.pairs_per_second, overview.calls_per_second
    by_calls = calls_rate * (overview.batch_pairs or 0)
    most_pairs = min(rate for rate in (pairs_rate or by_calls, by_calls or pairs_rate))
    if not most_pairs:
        return None
    seconds = SPAN_SECONDS * each
    use = []
    for span in spans:
        filled = min(1.0, span.sent / (most_pairs * seconds))
        calls = span.calls / (calls_rate * seconds) if calls_rate else 0.0
        use.append(SlotUse(taken=min(1.0, max(filled, calls)), filled=filled))
    return use


def _sums(spans: list[Span]) -> list[Span]:
    total = Span()
    for span in spans:
        total.add(span)
    return [total]


def _last(use: list[SlotUse] | None) -> SlotUse | None:
    return use[-1] if use else None
