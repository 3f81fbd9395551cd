"""The counts of the status page: by intervals of ten seconds, by minutes, and for the last ten minutes.

Replicas exchange a `MinuteReport` for each minute over Redis, as msgpack. A reader does not trust it: msgspec
rejects anything that does not have this shape or exceeds these limits.
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
# The window begins and ends within a minute, so it touches one minute more.
WINDOW_MINUTES = WINDOW_SECONDS // MINUTE_SECONDS + 1
TOP_CALLERS = 8
_MINUTE_INTERVALS = MINUTE_SECONDS // INTERVAL_SECONDS
_MAX_NAME_LENGTH = 64
_MAX_COUNT = 2**40
_CODES = frozenset(code.name for code in grpc.StatusCode)

Count = Annotated[int, msgspec.Meta(ge=0, le=_MAX_COUNT)]
Name = Annotated[str, msgspec.Meta(max_length=_MAX_NAME_LENGTH)]


class Interval(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The counts of ten seconds.

    `requests` are answered RPCs. `hits`, `coalesced`, `inferred` and `failed` are pairs by outcome. `calls`
    are calls to the model, `failed_calls` those that failed, and `sent` the pairs in them.
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
        """Add the counts of another interval.

        Field by field, because the page of a fleet does this thousands of times.
        """
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
        """Return the number of requested pairs."""
        return self.hits + self.coalesced + self.inferred + self.failed


class CallerTotals(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """The pairs of a caller: `hits` from a cache, `misses` from the model, `failed` without an answer."""

    name: Name
    hits: Count = 0
    misses: Count = 0
    failed: Count = 0

    @property
    def pairs(self) -> int:
        """Return the number of pairs that the caller requested."""
        return self.hits + self.misses + self.failed


class MinuteReport(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """One minute of one replica: its intervals, busiest callers, and the status of the last failed call."""

    intervals: Annotated[
        list[Interval], msgspec.Meta(min_length=_MINUTE_INTERVALS, max_length=_MINUTE_INTERVALS)
    ] = msgspec.field(default_factory=lambda: [Interval() for _ in range(_MINUTE_INTERVALS)])
    callers: Annotated[list[CallerTotals], msgspec.Meta(max_length=TOP_CALLERS)] = []
    last_failure: Name = ""


class WindowTotals(msgspec.Struct):
    """The counts of the last ten minutes: of each interval, oldest first, and in total.

    `last_failure_seconds` is how long ago the last call failed, with a precision of ten seconds.
    """

    intervals: list[Interval]
    total: Interval
    callers: list[CallerTotals]
    last_failure: str | None
    last_failure_seconds: float | None


_decoder = msgspec.msgpack.Decoder(MinuteReport)


def encode_report(minute: MinuteReport) -> bytes:
    """Encode the report of a minute."""
    return msgspec.msgpack.encode(minute)


def decode_report(report: bytes) -> MinuteReport | None:
    """Decode the report of a minute. Return None if it is invalid."""
    try:
        return _decoder.decode(report)
    except (msgspec.DecodeError, RecursionError):
        return None


def busiest(callers: Iterable[CallerTotals]) -> list[CallerTotals]:
    """Return the callers with most pairs, the busiest first."""
    active = [caller for caller in callers if caller.pairs]
    return sorted(active, key=lambda caller: (-caller.pairs, caller.name))[:TOP_CALLERS]


class WindowAggregator:
    """Adds up the last ten minutes of any number of replicas, one minute of one replica at a time.

    Callers are counted by whole minutes, and only the busiest callers of each report.
    """

    def __init__(self, *, now_seconds: float) -> None:
        self._last = int(now_seconds // INTERVAL_SECONDS)
        self._first = self._last - WINDOW_INTERVALS + 1
        self._intervals = [Interval() for _ in range(WINDOW_INTERVALS)]
        self._callers: dict[str, CallerTotals] = {}
        self._failures: dict[int, str] = {}

    def add(self, number: int, minute: MinuteReport) -> None:
        """Add a replica's report. `number` counts minutes since 1970."""
        if not self._first < (number + 1) * _MINUTE_INTERVALS <= self._last + _MINUTE_INTERVALS:
            return
        for index, interval in enumerate(minute.intervals, start=number * _MINUTE_INTERVALS):
            if self._first <= index <= self._last:
                self._intervals[index - self._first].add(interval)
                if interval.failed_calls and minute.last_failure:
                    is_known = minute.last_failure in _CODES
                    self._failures[index] = minute.last_failure if is_known else "unknown"
        for part in minute.callers:
            name = part.name if part.name.isprintable() and part.name else "(unreadable)"
            caller = self._callers.get(name)
            if caller is None:
                caller = self._callers[name] = CallerTotals(name)
            caller.hits += part.hits
            caller.misses += part.misses
            caller.failed += part.failed

    def totals(self) -> WindowTotals:
        """Return the totals of all added reports."""
        total = Interval()
        for interval in self._intervals:
            total.add(interval)
        failed_at = max(self._failures, default=None)
        return WindowTotals(
            intervals=self._intervals,
            total=total,
            callers=busiest(self._callers.values()),
            last_failure=None if failed_at is None else self._failures[failed_at],
            last_failure_seconds=None if failed_at is None else (self._last - failed_at) * INTERVAL_SECONDS,
        )


def aggregate(reports: Iterable[tuple[int, MinuteReport]], *, now_seconds: float) -> WindowTotals:
    """Add up a few reports."""
    aggregator = WindowAggregator(now_seconds=now_seconds)
    for number, minute in reports:
        aggregator.add(number, minute)
    return aggregator.totals()


def busiest_callers(counts_by_caller: Mapping[str, Counter[str]]) -> list[CallerTotals]:
    """Return the busiest of the callers that `RpcMetrics` counted."""
    return busiest(
        CallerTotals(name[:_MAX_NAME_LENGTH], counts["hit"], counts["miss"], counts["failed"])
        for name, counts in counts_by_caller.items()
    )
