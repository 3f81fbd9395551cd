"""The rendered status page: hostile text stays text, and unknown values are shown as unknown."""

from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest

from services.cache_proxy.queue.snapshot import QueueSnapshot
from services.cache_proxy.status import formatting
from services.cache_proxy.status.render import HEADERS, Renderer
from services.cache_proxy.status.report import (
    FailureInfo,
    ReplicaInfo,
    StatusReport,
    StoreStatus,
    replica_report,
)
from services.cache_proxy.status.rolling_window import CallerTotals, Interval, MinuteReport

NOW = 1_800_000_000.0
HOSTILE = "</td><script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
RENDER = Renderer()


class ParsedPage(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, document: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(document.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record an element, as `HTMLParser`."""
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Record a text, as `HTMLParser`."""
        self.text += data

    def count(self, tag: str) -> int:
        """Return the number of elements with a tag."""
        return sum(tag == found for found, _ in self.elements)


def _queue_snapshot(**changes: Any) -> QueueSnapshot:
    fields: dict[str, Any] = {
        "now_seconds": NOW,
        "waiting": dict.fromkeys(("interactive", "bulk", "refresh"), 0),
        "next_call_seconds": 0.5,
        "batch_pairs": 1000,
        "batch_interval_seconds": 1.0,
        "pairs_per_second": 1000.0,
        "calls_per_second": 1.0,
        "failures_in_a_row": 0,
        "live_replicas": 1,
        "silent_replicas": 0,
    }
    return QueueSnapshot(**fields | changes)


def _report(
    *minutes: MinuteReport, kind: str = "memory", snapshot: QueueSnapshot | None = None
) -> StatusReport:
    replica = ReplicaInfo("0" * 16, StoreStatus(kind, "ok", None), 60.0)
    return replica_report(
        "not shared", snapshot, replica, [(int(NOW // 60), minute) for minute in minutes], now_seconds=NOW
    )


def test_hostile_names_add_no_element_or_attribute() -> None:
    """A caller, a store and a failure whose names are markup are shown as text."""
    minute = MinuteReport(callers=[CallerTotals("plain", hits=1)])
    plain = ParsedPage(RENDER(_report(minute, snapshot=_queue_snapshot())))
    minute = MinuteReport(callers=[CallerTotals(HOSTILE, hits=1)])
    report = _report(minute, kind=HOSTILE, snapshot=_queue_snapshot())
    hostile = ParsedPage(RENDER(report))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    # The caller once, the store twice.
    assert hostile.text.count(HOSTILE) == 3
    report.store.last_failure = FailureInfo(HOSTILE, 1.0)
    assert HOSTILE in ParsedPage(RENDER(report)).text
    assert all(not name.startswith("on") for _, attributes in hostile.elements for name in attributes)


def test_page_loads_no_other_resource() -> None:
    """Script and style are inline, and the policy allows only their hashes."""
    page = ParsedPage(RENDER(_report(snapshot=_queue_snapshot())))
    loads = {"src", "srcset", "data", "poster", "action", "style"}
    assert not [attributes for _, attributes in page.elements if loads & attributes.keys()]
    links = [attributes["href"] for _, attributes in page.elements if "href" in attributes]
    assert links == ["data:,", "metrics", "status.json"]
    assert (page.count("script"), page.count("style")) == (1, 1)
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_unknown_values_are_shown_as_unknown() -> None:
    """Without valid values of the queue the page is rendered, and shows no number for them."""
    nothing = _queue_snapshot(
        waiting=dict.fromkeys(("interactive", "bulk", "refresh")),
        next_call_seconds=None,
        batch_pairs=None,
        batch_interval_seconds=None,
        pairs_per_second=None,
        calls_per_second=None,
        failures_in_a_row=None,
        live_replicas=None,
        silent_replicas=None,
    )
    for snapshot in (nothing, None):
        page = ParsedPage(RENDER(_report(snapshot=snapshot)))
        assert page.text.count("unknown") >= 6
        assert "None" not in page.text


@pytest.mark.parametrize(
    ("limits", "taken", "filled"),
    [((1000.0, 1.0), 0.4, 0.2), ((1000.0, 0.0), 0.2, 0.2), ((0.0, 1.0), 0.4, 0.2), ((500.0, 1.0), 0.4, 0.4)],
)
def test_utilization_is_share_of_stricter_limit(
    limits: tuple[float, float], taken: float, filled: float
) -> None:
    """Four calls of 500 pairs in ten seconds, by a limit on calls, on pairs, or both."""
    minute = MinuteReport()
    minute.intervals[0] = Interval(calls=4, sent=2000)
    pairs_rate, calls_rate = limits
    report = _report(
        minute, snapshot=_queue_snapshot(pairs_per_second=pairs_rate, calls_per_second=calls_rate)
    )
    assert report.slot_use
    assert (report.slot_use[-1].taken, report.slot_use[-1].filled) == (taken, filled)
    assert RENDER(report)


def test_calls_saved_compare_with_calls_without_cache() -> None:
    """Without a cache, at least a call a request and a call for each full batch. Extra calls save nothing."""
    minute = MinuteReport()
    minute.intervals[0] = Interval(requests=3, hits=4000, inferred=500, calls=1, sent=500)
    report = _report(minute, snapshot=_queue_snapshot())
    assert (report.calls_needed, report.calls_saved) == (5, 4)
    minute.intervals[0] = Interval(requests=30, hits=30, calls=40)
    report = _report(minute, snapshot=_queue_snapshot())
    assert (report.calls_needed, report.calls_saved) == (30, 0)


def test_json_report_has_named_fields() -> None:
    """Other programs read the JSON."""
    report = _report(MinuteReport(callers=[CallerTotals("a", hits=2, failed=1)]), snapshot=_queue_snapshot())
    decoded = msgspec.json.decode(msgspec.json.encode(report))
    assert decoded["total"]["hits"] == 0
    assert decoded["callers"] == [{"name": "a", "pairs": 3, "hits": 2, "misses": 0, "failed": 1}]


@pytest.mark.parametrize(
    ("formatted", "expected"),
    [
        (formatting.format_percent(1.0), "100.0"),
        (formatting.format_percent(0.99999), "99.9"),
        (formatting.format_percent(0.0004), "<0.1"),
        (formatting.format_percent(0.0), "0.0"),
        (formatting.format_percent(0.57, digits=0), "57"),
        (formatting.format_count(9_999_999), "9,999,999"),
        (formatting.format_count(12_600_000), "12.6 M"),
        (formatting.format_count(3_500_000_000), "3.5 G"),
        (formatting.format_count(2**50), "1.1 P"),
        (formatting.format_count(None), "unknown"),
        (formatting.format_quantity(1, "call"), "1 call"),
        (formatting.format_quantity(0, "call"), "0 calls"),
        (formatting.format_duration(0.01), "at once"),
        (formatting.format_duration(0.44), "0.4 s"),
        (formatting.format_duration(59.4), "59 s"),
        (formatting.format_duration(200), "3 min 20 s"),
        (formatting.format_duration(7500), "2 h 5 min"),
        (formatting.format_duration(266_400), "3 d 2 h"),
        (formatting.format_duration(3600), "1 h"),
        (formatting.format_ago(5), "just now"),
        (formatting.format_ago(120), "2 min ago"),
        (formatting.format_clock(NOW), "08:00:00"),
    ],
)
def test_numbers_are_formatted_for_people(formatted: str, expected: str) -> None:
    """Units stay with their numbers. Nothing is rounded up to 100 % or down to 0."""
    assert formatted.replace("\u00a0", " ") == expected
