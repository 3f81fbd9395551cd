"""What is counted for the status page: a replica's figures by ten seconds and by the minute, and their sums.

A `Minute` is what replicas hand each other by way of Redis, as msgpack. Whoever reads one takes it for
hostile: msgspec refuses what is not of this shape and within these bounds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Annotated

import grpc
import msgspec

INTERVAL_SECONDS = 10
MINUTE_SECONDS = 60
WINDOW_SECONDS = 600
WINDOW_INTERVALS = WINDOW_SECONDS // INTERVAL_SECONDS
WINDOW_MINUTES = (
    WINDOW_SECONDS // MINUTE_SECONDS + 1
)  # the one under way, and that in which the window begins
TOP_CALLERS = 8
_MINUTE_INTERVALS = MINUTE_SECONDS // INTERVAL_SECONDS
_MAX_NAME_LENGTH = 64
_MAX_COUNT = 2**40
_CODES = frozenset(code.name for code in grpc.StatusCode)

Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNT)]
Name = Annotated[str, msgspec.Meta(max_length=_MAX_NAME_LENGTH)]


class Interval(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """Ten seconds. `requests` are RPCs that were answered; of pairs `failed` had no answer.

    `calls` are those to the model, `failed_calls` of them, and `sent` the pairs in them.
    """

    requests: Count = 0
    hits: Count = 0
    coalesced: Count = 0
    inferred: Count = 0
    failed: Count = 0
    calls: Count = 0
    failed_calls: Count = 0
    sent: Count = 0

    def add(self, other: "Interval") -> None:
        """Count the other's too: a fleet's page does it thousands of times, so field by field."""
        self.requests += other.requests
        self.hits += other.hits
        self.coalesced += other.coalesced
        self.inferred += other.inferred
        self.failed += other.failed
        self.calls += other.calls
        self.failed_calls += other.failed_calls
        self.sent += other.sent

    @property
    def pairs(self) -> int:
        """All that were asked for."""
        return self.hits + self.coalesced + self.inferred + self.failed


class CallerTotals(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A caller's pairs: `hits` from a cache, `misses` had to wait for the model, `failed` had no answer."""

    name: Name
    hits: Count = 0
    misses: Count = 0
    failed: Count = 0

    @property
    def pairs(self) -> int:
        """All that it asked for."""
        return self.hits + self.misses + self.failed


class MinuteReport(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """A replica's minute: its spans, its busiest callers, and the status of the last call that failed."""

    intervals: Annotated[
        list[Interval], msgspec.Meta(min_length=_MINUTE_INTERVALS, max_length=_MINUTE_INTERVALS)
    ] = msgspec.field(default_factory=lambda: [Interval() for _ in range(_MINUTE_INTERVALS)])
    callers: Annotated[list[CallerTotals], msgspec.Meta(max_length=TOP_CALLERS)] = []
    last_failure: Name = ""


class WindowTotals(msgspec.Struct):
    """The window's figures: of each of its spans, oldest first, and of all together."""

    intervals: list[Interval]
    total: Interval
    callers: list[CallerTotals]
    last_failure: str | None
    last_failure_seconds: float | None
    """How long ago, to ten seconds."""


_decoder = msgspec.msgpack.Decoder(MinuteReport)


def encode_report(minute: MinuteReport) -> bytes:
    """As a report."""
    return msgspec.msgpack.encode(minute)


def decode_report(report: bytes) -> MinuteReport | None:
    """The minute that was reported; None if that is none."""
    try:
        return _decoder.decode(report)
    except (msgspec.DecodeError, RecursionError):
        return None


def busiest(callers: Iterable[CallerTotals]) -> list[CallerTotals]:
    """The busiest, busiest first."""
    asked = [caller for caller in callers if caller.pairs]
    return sorted(asked, key=lambda caller: (-caller.pairs, caller.name))[:TOP_CALLERS]


class WindowAggregator:
    """The last ten minutes, of any number of replicas, added one minute of one replica at a time.

    Callers are counted by whole minutes, and of each minute of each replica only the busiest.
    """

    def __init__(self, *, now_seconds: float) -> None:
        self._last = int(now_seconds // INTERVAL_SECONDS)
        self._first = self._last - WINDOW_INTERVALS + 1
        self._intervals = [Interval() for _ in range(WINDOW_INTERVALS)]
        self._callers: dict[str, CallerTotals] = {}
        self._failures: dict[int, str] = {}

    def add(self, number: int, minute: MinuteReport) -> None:
        """The minute of that number since 1970."""
        if not self._first < (number + 1) * _MINUTE_INTERVALS <= self._last + _MINUTE_INTERVALS:
            return
        for at, span in enumerate(minute.intervals, start=number * _MINUTE_INTERVALS):
            if self._first <= at <= self._last:
                self._intervals[at - self._first].add(span)
                if span.failed_calls and minute.last_failure:
                    known = minute.last_failure in _CODES
                    self._failures[at] = minute.last_failure if known else "unknown"
        for part in minute.callers:
            name = part.name if part.name.isprintable() and part.name else "(unreadable)"
            caller = self._callers.get(name)
            if caller is None:
                caller = self._callers[name] = CallerTotals(name)
            caller.hits += part.hits
            caller.misses += part.misses
            caller.failed += part.failed

    def totals(self) -> WindowTotals:
        """Of what was added."""
        total = Interval()
        for span in self._intervals:
            total.add(span)
        failed_at = max(self._failures, default=None)
        return WindowTotals(
            intervals=self._intervals,
            total=total,
            callers=busiest(self._callers.values()),
            last_failure=None if failed_at is None else self._failures[failed_at],
            last_failure_seconds=None if failed_at is None else (self._last - failed_at) * INTERVAL_SECONDS,
        )


def aggregate(reports: Iterable[tuple[int, MinuteReport]], *, now_seconds: float) -> WindowTotals:
    """The sums of a few minutes."""
    summing = WindowAggregator(now_seconds=now_seconds)
    for number, minute in reports:
        summing.add(number, minute)
    return summing.totals()


def busiest_callers(counts_by_caller: Mapping[str, Counter[str]]) -> list[CallerTotals]:
    """The busiest of those that `RpcMetrics` counted."""
    return busiest(
        CallerTotals(name[:_MAX_NAME_LENGTH], counts["hit"], counts["miss"], counts["failed"])
        for name, counts in counts_by_caller.items()
    )
