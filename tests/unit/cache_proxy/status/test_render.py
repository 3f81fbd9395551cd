"""The page that is made of figures: what is hostile stays text, and what is unknown is called so."""

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


class Elements(HTMLParser):
    """Every element, its attributes, and the texts."""

    def __init__(self, document: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(document.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """See `HTMLParser`."""
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """See `HTMLParser`."""
        self.text += data

    def count(self, tag: str) -> int:
        """How many there are."""
        return sum(tag == found for found, _ in self.elements)


def _overview(**changes: Any) -> QueueSnapshot:
    figures: dict[str, Any] = {
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
    return QueueSnapshot(**figures | changes)


def _figures(
    *minutes: MinuteReport, kind: str = "memory", overview: QueueSnapshot | None = None
) -> StatusReport:
    own = ReplicaInfo("0" * 16, StoreStatus(kind, "ok", None), 60.0)
    return replica_report(
        "not shared", overview, own, [(int(NOW // 60), minute) for minute in minutes], now_seconds=NOW
    )


def test_what_is_hostile_stays_text() -> None:
    """A caller, a store and a failure with markup for names add no element and no attribute to the page."""
    minute = MinuteReport(callers=[CallerTotals("plain", hits=1)])
    plain = Elements(RENDER(_figures(minute, overview=_overview())))
    minute = MinuteReport(callers=[CallerTotals(HOSTILE, hits=1)])
    figures = _figures(minute, kind=HOSTILE, overview=_overview())
    hostile = Elements(RENDER(figures))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    assert hostile.text.count(HOSTILE) == 3  # the caller; the store, twice
    figures.store.last_failure = FailureInfo(HOSTILE, 1.0)
    assert HOSTILE in Elements(RENDER(figures)).text
    assert all(not name.startswith("on") for _, attributes in hostile.elements for name in attributes)


def test_the_page_asks_for_nothing_else() -> None:
    """No element of it loads anything; what runs and what styles is inline, by its hash."""
    page = Elements(RENDER(_figures(overview=_overview())))
    loads = {"src", "srcset", "data", "poster", "action", "style"}
    assert not [attributes for _, attributes in page.elements if loads & attributes.keys()]
    links = [attributes["href"] for _, attributes in page.elements if "href" in attributes]
    assert links == ["data:,", "metrics", "status.json"]
    assert (page.count("script"), page.count("style")) == (1, 1)
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_what_is_unknown_is_called_unknown() -> None:
    """Without any believable figure of the queue the page is still there, and tells no number for it."""
    nothing = _overview(
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
    for overview in (nothing, None):
        page = Elements(RENDER(_figures(overview=overview)))
        assert page.text.count("unknown") >= 6
        assert "None" not in page.text


@pytest.mark.parametrize(
    ("limits", "taken", "filled"),
    [((1000.0, 1.0), 0.4, 0.2), ((1000.0, 0.0), 0.2, 0.2), ((0.0, 1.0), 0.4, 0.2), ((500.0, 1.0), 0.4, 0.4)],
)
def test_slot_use_is_a_share_of_the_scarcer_limit(
    limits: tuple[float, float], taken: float, filled: float
) -> None:
    """Four calls of 500 pairs in ten seconds, by the limit of calls, of pairs, or both."""
    minute = MinuteReport()
    minute.intervals[0] = Interval(calls=4, sent=2000)
    pairs_rate, calls_rate = limits
    figures = _figures(minute, overview=_overview(pairs_per_second=pairs_rate, calls_per_second=calls_rate))
    assert figures.slot_use
    assert (figures.slot_use[-1].taken, figures.slot_use[-1].filled) == (taken, filled)
    assert RENDER(figures)


def test_calls_saved_are_those_that_the_requests_would_have_cost() -> None:
    """A call a request and a call for each full batch at least; what was called in vain is no saving."""
    minute = MinuteReport()
    minute.intervals[0] = Interval(requests=3, hits=4000, inferred=500, calls=1, sent=500)
    figures = _figures(minute, overview=_overview())
    assert (figures.calls_needed, figures.calls_saved) == (5, 4)
    minute.intervals[0] = Interval(requests=30, hits=30, calls=40)
    figures = _figures(minute, overview=_overview())
    assert (figures.calls_needed, figures.calls_saved) == (30, 0)


def test_the_figures_are_told_by_name() -> None:
    """As JSON, for other programs."""
    figures = _figures(MinuteReport(callers=[CallerTotals("a", hits=2, failed=1)]), overview=_overview())
    told = msgspec.json.decode(msgspec.json.encode(figures))
    assert told["total"]["hits"] == 0
    assert told["callers"] == [{"name": "a", "pairs": 3, "hits": 2, "misses": 0, "failed": 1}]


@pytest.mark.parametrize(
    ("said", "expected"),
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
def test_figures_are_said_as_people_read_them(said: str, expected: str) -> None:
    """Units stay with their numbers, and nothing is rounded up to all or down to nothing."""
    assert said.replace("\u00a0", " ") == expected
