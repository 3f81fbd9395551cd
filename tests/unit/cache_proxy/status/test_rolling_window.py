"""What is counted for the status page, and what is not believed of it."""

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

NOW = 1_800_000_000.0 + 25  # in the third span of a minute
THIS = int(NOW // MINUTE_SECONDS)


def _minute(**counts: int) -> MinuteReport:
    minute = MinuteReport()
    minute.intervals[0] = Interval(**counts)
    return minute


def test_the_window_holds_ten_minutes_of_every_replica() -> None:
    """Figures of two replicas are summed; what is older than ten minutes, or not yet, is not counted."""
    minutes = [
        (THIS, _minute(hits=1)),
        (THIS, _minute(hits=10)),
        (THIS - 9, _minute(hits=100)),
        (THIS - 10, _minute(hits=1000)),  # its first ten seconds are over ten minutes ago
        (THIS + 1, _minute(hits=10_000)),
    ]
    sums = aggregate(minutes, now_seconds=NOW)
    assert sums.total.hits == 111
    assert len(sums.intervals) == WINDOW_INTERVALS
    assert sums.intervals[-3].hits == 11  # two spans of this minute came since


def test_the_last_failure_is_the_newest() -> None:
    """Its kind and its age are of the newest ten seconds in which a call failed, whichever replica's."""
    older, newer = _minute(failed_calls=1), _minute(failed_calls=1)
    older.last_failure, newer.last_failure = "UNAVAILABLE", "DEADLINE_EXCEEDED"
    sums = aggregate([(THIS, newer), (THIS - 3, older)], now_seconds=NOW)
    assert (sums.last_failure, sums.last_failure_seconds) == ("DEADLINE_EXCEEDED", 2 * INTERVAL_SECONDS)


def test_callers_of_all_replicas_are_one_list() -> None:
    """A caller at two replicas is one line, the busiest are first, and no more than a few are listed."""
    one, other = MinuteReport(), MinuteReport()
    one.callers = [CallerTotals("a", hits=5), CallerTotals("b", misses=7)]
    other.callers = [CallerTotals("a", hits=5, failed=1), *(CallerTotals(f"c{n}", hits=1) for n in range(7))]
    listed = aggregate([(THIS, one), (THIS, other)], now_seconds=NOW).callers
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
def test_a_report_that_is_none_is_not_believed(report: bytes) -> None:
    """Wrong types, negative, huge, too many and too long: none of it becomes a figure."""
    assert decode_report(report) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_report_or_none(report: bytes) -> None:
    """Whatever stands in Redis, it never breaks the page."""
    found = decode_report(report)
    if found is not None:
        aggregate([(THIS, found)], now_seconds=NOW)


def test_a_name_that_nobody_could_read_is_not_shown() -> None:
    """From Redis may come what no caller may send: control characters, or letters that turn the line."""
    minute = MinuteReport(callers=[CallerTotals("\u202egnp.exe", hits=1), CallerTotals("\x00", hits=1)])
    [caller] = aggregate([(THIS, minute)], now_seconds=NOW).callers
    assert (caller.name, caller.pairs) == ("(unreadable)", 2)


def test_a_code_that_is_none_is_not_shown() -> None:
    """The kind of a failure is a gRPC status or unknown, never somebody's text."""
    minute = _minute(failed_calls=1)
    minute.last_failure = "<b>"
    assert aggregate([(THIS, minute)], now_seconds=NOW).last_failure == "unknown"


def test_the_largest_report_fits() -> None:
    """Eight callers with the longest names, in the longest letters, are within the bound of a report."""
    most = 2**40
    pairs = {
        f"{number}" + "\U0001f600" * 63: Counter(hit=most, miss=most, failed=most)
        for number in range(TOP_CALLERS)
    }
    minute = MinuteReport(
        intervals=[Interval(*[most] * 8)] * 6, callers=busiest_callers(pairs), last_failure="UNAVAILABLE"
    )
    report = encode_report(minute)
    assert len(report) <= MAX_REPORT_BYTES
    assert decode_report(report) == minute


def test_a_replica_reports_what_it_counted_until_that_arrived() -> None:
    """Metrics become a minute; a report that was lost is due again, one that arrived is not."""
    metrics = ProxyMetrics(CollectorRegistry())
    ledger = MetricsSampler(metrics)
    metrics.rpcs.count(code="OK", seconds=0.1, caller="a", outcomes={"l1": 3, "inferred": 2, "failed": 1})
    metrics.model_calls.labels("UNAVAILABLE").inc()
    metrics.model_pairs.inc(2)
    ledger.sample()
    [report] = _due(ledger)
    assert _due(ledger) == [report]
    ledger.mark_reported([report], clock_offset_seconds=ledger.now_seconds - _monotonic(ledger))
    assert not _due(ledger)
    ledger.resend_all()
    assert _due(ledger) == [report]
    minute = decode_report(report[1])
    assert minute
    total = aggregate([(report[0], minute)], now_seconds=ledger.now_seconds).total
    assert total == Interval(requests=1, hits=3, inferred=2, failed=1, calls=1, failed_calls=1, sent=2)
    assert minute.callers == [CallerTotals("a", hits=3, misses=2, failed=1)]
    assert minute.last_failure == "UNAVAILABLE"


def _due(ledger: MetricsSampler) -> list[tuple[int, bytes]]:
    """As if the last look were long ago."""
    ledger._last_pending_at = 0.0
    return list(ledger.pending_reports())


def _monotonic(ledger: MetricsSampler) -> float:
    return ledger.now_seconds - ledger._clock_offset_seconds
