"""The counts of the status page, and reports from Redis that are not trusted."""

from collections import Counter

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.snapshot import MAX_REPORT_BYTES
from services.cache_proxy.status.rolling_window import (
    INTERVAL_SECONDS,
    MINUTE_SECONDS,
    TOP_CALLERS,
    WINDOW_INTERVALS,
    CallerTotals,
    Interval,
    MinuteReport,
    aggregate,
    busiest_callers,
    decode_report,
    encode_report,
)
from services.cache_proxy.status.sampler import MetricsSampler

# In the third interval of a minute.
NOW = 1_800_000_000.0 + 25
THIS_MINUTE = int(NOW // MINUTE_SECONDS)


def _minute_report(**counts: int) -> MinuteReport:
    minute = MinuteReport()
    minute.intervals[0] = Interval(**counts)
    return minute


def test_window_adds_up_ten_minutes_of_all_replicas() -> None:
    """Reports that are older than ten minutes, or from the future, are not counted."""
    reports = [
        (THIS_MINUTE, _minute_report(hits=1)),
        (THIS_MINUTE, _minute_report(hits=10)),
        (THIS_MINUTE - 9, _minute_report(hits=100)),
        # Its first ten seconds are more than ten minutes ago.
        (THIS_MINUTE - 10, _minute_report(hits=1000)),
        (THIS_MINUTE + 1, _minute_report(hits=10_000)),
    ]
    totals = aggregate(reports, now_seconds=NOW)
    assert totals.total.hits == 111
    assert len(totals.intervals) == WINDOW_INTERVALS
    # Two intervals of this minute came later.
    assert totals.intervals[-3].hits == 11


def test_last_failure_is_newest_of_all_replicas() -> None:
    """Its status and age are those of the newest interval with a failed call."""
    older = _minute_report(failed_calls=1)
    older.last_failure = "UNAVAILABLE"
    newer = _minute_report(failed_calls=1)
    newer.last_failure = "DEADLINE_EXCEEDED"
    totals = aggregate([(THIS_MINUTE, newer), (THIS_MINUTE - 3, older)], now_seconds=NOW)
    assert (totals.last_failure, totals.last_failure_seconds) == ("DEADLINE_EXCEEDED", 2 * INTERVAL_SECONDS)


def test_callers_of_all_replicas_are_merged() -> None:
    """A caller of two replicas is one row, the busiest come first, and the list is short."""
    one = MinuteReport()
    other = MinuteReport()
    one.callers = [CallerTotals("a", hits=5), CallerTotals("b", misses=7)]
    other.callers = [CallerTotals("a", hits=5, failed=1), *(CallerTotals(f"c{n}", hits=1) for n in range(7))]
    listed = aggregate([(THIS_MINUTE, one), (THIS_MINUTE, other)], now_seconds=NOW).callers
    assert [(caller.name, caller.pairs) for caller in listed[:2]] == [("a", 11), ("b", 7)]
    assert len(listed) == TOP_CALLERS


@pytest.mark.parametrize(
    "report",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        msgpack.packb("text"),
        msgpack.packb([[], [], ""]),
        msgpack.packb([[[0] * 8] * 7, [], ""]),
        msgpack.packb([[[-1] + [0] * 7] + [[0] * 8] * 5, [], ""]),
        msgpack.packb([[[2**63] + [0] * 7] + [[0] * 8] * 5, [], ""]),
        msgpack.packb([[[1.5] + [0] * 7] + [[0] * 8] * 5, [], ""]),
        msgpack.packb([[[0] * 8] * 6, [["n" * 65, 1, 1, 1]], ""]),
        msgpack.packb([[[0] * 8] * 6, [["n", 1, 1, 1]] * (TOP_CALLERS + 1), ""]),
        msgpack.packb([[[0] * 8] * 6, [], "x" * 65]),
    ],
    ids=lambda report: repr(report[:12]),
)
def test_invalid_report_is_rejected(report: bytes) -> None:
    """Wrong types, negative, huge, too many or too long values are not counted."""
    assert decode_report(report) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_rejected(report: bytes) -> None:
    """No value in Redis breaks the page."""
    decoded = decode_report(report)
    if decoded is not None:
        aggregate([(THIS_MINUTE, decoded)], now_seconds=NOW)


def test_unprintable_caller_names_are_replaced() -> None:
    """Redis may contain names that no caller may send: control characters, or ones that reverse the line."""
    minute = MinuteReport(callers=[CallerTotals("\u202egnp.exe", hits=1), CallerTotals("\x00", hits=1)])
    [caller] = aggregate([(THIS_MINUTE, minute)], now_seconds=NOW).callers
    assert (caller.name, caller.pairs) == ("(unreadable)", 2)


def test_unknown_status_of_failure_is_replaced() -> None:
    """The kind of a failure is a gRPC status or unknown, never arbitrary text."""
    minute = _minute_report(failed_calls=1)
    minute.last_failure = "<b>"
    assert aggregate([(THIS_MINUTE, minute)], now_seconds=NOW).last_failure == "unknown"


def test_largest_report_is_within_size_limit() -> None:
    """Eight callers with the longest names in the longest characters."""
    max_count = 2**40
    counts_by_caller = {
        f"{number}" + "\U0001f600" * 63: Counter(hit=max_count, miss=max_count, failed=max_count)
        for number in range(TOP_CALLERS)
    }
    minute = MinuteReport(
        intervals=[Interval(*[max_count] * 8)] * 6,
        callers=busiest_callers(counts_by_caller),
        last_failure="UNAVAILABLE",
    )
    report = encode_report(minute)
    assert len(report) <= MAX_REPORT_BYTES
    assert decode_report(report) == minute


def test_report_is_pending_until_it_was_stored() -> None:
    """A report that was lost is pending again, a stored one is not."""
    metrics = ProxyMetrics(CollectorRegistry())
    sampler = MetricsSampler(metrics)
    metrics.rpcs.count(code="OK", seconds=0.1, caller="a", outcomes={"l1": 3, "inferred": 2, "failed": 1})
    metrics.model_calls.labels("UNAVAILABLE").inc()
    metrics.model_pairs.inc(2)
    sampler.sample()
    [report] = _pending(sampler)
    assert _pending(sampler) == [report]
    sampler.mark_reported([report], clock_offset_seconds=sampler.now_seconds - _monotonic(sampler))
    assert not _pending(sampler)
    sampler.resend_all()
    assert _pending(sampler) == [report]
    minute = decode_report(report[1])
    assert minute
    total = aggregate([(report[0], minute)], now_seconds=sampler.now_seconds).total
    assert total == Interval(requests=1, hits=3, inferred=2, failed=1, calls=1, failed_calls=1, sent=2)
    assert minute.callers == [CallerTotals("a", hits=3, misses=2, failed=1)]
    assert minute.last_failure == "UNAVAILABLE"


def _pending(sampler: MetricsSampler) -> list[tuple[int, bytes]]:
    """Return the pending reports as if the last call were long ago."""
    sampler._last_pending_at = 0.0
    return list(sampler.pending_reports())


def _monotonic(sampler: MetricsSampler) -> float:
    return sampler.now_seconds - sampler._clock_offset_seconds
