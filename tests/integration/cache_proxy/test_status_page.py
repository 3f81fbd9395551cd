"""The status page in a real browser: two replicas, their Redis, and the model's log."""

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, Page, Request

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.redis_keys import QueueKeys
from tests.integration.cache_proxy.conftest import ProxyEnvironment
from tests.support.browser import chromium
from tests.support.caller import make_pairs, open_caller
from tests.support.fleet import Fleet, fleet
from tests.support.redis_server import wait_for

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"[:64]
ENOUGH_CONTRAST = 4.5
VIEWING_SECONDS = 2.0
FAST = ("--model-rate", "50000", "--model-calls-per-second", "50")
COLOR_SCHEMES = ("light", "dark")
CALLERS = ("plain", HOSTILE)


@dataclass(frozen=True)
class RequestTotals:
    """How many requests were sent, and how many pairs were hits and misses."""

    requests: int
    hits: int
    misses: int


@dataclass(frozen=True)
class StatusScene:
    """A fleet of two replicas that have answered requests, their totals, and a browser."""

    fleet: Fleet
    totals: RequestTotals
    browser: Browser

    @property
    def http_url(self) -> str:
        """Return the URL of the first replica's page."""
        return self.fleet.proxies[0].http_url


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatusScene]:
    """Send 300 pairs from each of two callers to each of two replicas. Half of the pairs are the same."""
    with chromium() as browser, fleet(tmp_path_factory.mktemp("status")) as running:
        requests = hits = misses = 0
        for proxy in running.start_replicas(2, *FAST):
            with open_caller(proxy.target) as caller:
                for name in CALLERS:
                    for prefix in ("all", name[:5]):
                        reply = caller.infer(make_pairs(prefix, 150), metadata=[("x-caller", name)])
                        requests += 1
                        hits += reply.hits
                        misses += reply.misses
        yield StatusScene(running, RequestTotals(requests, hits, misses), browser)


@contextmanager
def _page(scene: StatusScene, url: str | None = None, **options: Any) -> Iterator[Page]:
    context = scene.browser.new_context(**options)
    try:
        page = context.new_page()
        page.goto(url or scene.http_url)
        yield page
    finally:
        context.close()


def _read_status(http_url: str) -> dict[str, Any]:
    with urlopen(f"{http_url}/status.json", timeout=30) as response:
        status: dict[str, Any] = json.load(response)
    return status


def _wait_for_fleet_report(scene: StatusScene, http_url: str) -> dict[str, Any]:
    """Return the report of a replica once the reports of all replicas have arrived."""

    def complete() -> dict[str, Any] | None:
        status = _read_status(http_url)
        pairs = status["total"]["hits"] + status["total"]["inferred"] + status["total"]["coalesced"]
        arrived = pairs >= scene.totals.hits + scene.totals.misses and status["total"]["calls"]
        return status if status["scope"] == "fleet" and arrived else None

    found: dict[str, Any] = wait_for(complete, timeout_seconds=60, description="the reports of both replicas")
    return found


def _normalize_spaces(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\u00a0", " ")).strip()


@pytest.mark.slow
def test_every_replica_shows_counts_of_fleet(scene: StatusScene) -> None:
    """Pairs, hits, calls and callers equal the trailers and the model's own log."""
    calls = scene.fleet.model_calls
    for proxy in scene.fleet.proxies:
        status = _wait_for_fleet_report(scene, proxy.http_url)
        total = status["total"]
        assert (total["requests"], total["hits"]) == (scene.totals.requests, scene.totals.hits)
        assert total["inferred"] + total["coalesced"] == scene.totals.misses
        assert (total["calls"], total["sent"]) == (len(calls), sum(len(call.pairs) for call in calls))
        assert {line["name"]: line["pairs"] for line in status["callers"]} == dict.fromkeys(CALLERS, 600)
        assert (status["live_replicas"], status["silent_replicas"]) == (2, 0)
        assert status["calls_saved"] == scene.totals.requests - len(calls)
        with _page(scene, proxy.http_url) as page:
            rate = scene.totals.hits / (scene.totals.hits + scene.totals.misses)
            assert _normalize_spaces(page.inner_text("#hit-rate")) == f"{int(rate * 1000) / 10} %"
            assert _normalize_spaces(page.inner_text("#calls-saved")) == str(status["calls_saved"])
            assert _normalize_spaces(page.inner_text("#calls-made")) == str(len(calls))
            assert _normalize_spaces(page.inner_text("#live-replicas")) == "2 live"
            assert page.inner_text("#state") == "Working"
            assert page.locator("#alone").count() == 0
            assert page.locator("#queue tbody tr").count() == 3
            assert page.locator("rect.filled").count() > 1


@pytest.mark.slow
def test_counts_of_dead_replica_are_kept(scene: StatusScene) -> None:
    """A third replica answers, reports, and is killed. The others show its counts, and two replicas."""
    before = _wait_for_fleet_report(scene, scene.http_url)["total"]
    third = scene.fleet.start_replica(*FAST)
    with open_caller(third.target) as caller:
        caller.infer(make_pairs("all", 150), metadata=[("x-caller", CALLERS[0])])

    def counted() -> bool:
        return bool(_read_status(scene.http_url)["total"]["hits"] == before["hits"] + 150)

    wait_for(counted, timeout_seconds=60, description="the third replica has reported")
    third.stop(signal.SIGKILL)
    scene.fleet.proxies.remove(third)
    status = wait_for(
        lambda: (found := _read_status(scene.http_url))["live_replicas"] == 2 and found,
        timeout_seconds=60,
        description="it is missed",
    )
    assert status["total"]["hits"] == before["hits"] + 150


@pytest.mark.slow
@pytest.mark.parametrize("color_scheme", COLOR_SCHEMES)
def test_every_text_has_sufficient_contrast(scene: StatusScene, color_scheme: str) -> None:
    """In both colour schemes the contrast is at least 4.5, and the background is as requested."""
    with _page(scene, color_scheme=color_scheme) as page:
        texts = page.evaluate(_TEXTS_JS)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (_luminance(background) > 0.5) == (color_scheme == "light")
    assert len(texts) > 30
    poor = [
        (text, colour, behind)
        for text, colour, behind in texts
        if _contrast(colour, behind) < ENOUGH_CONTRAST
    ]
    assert not poor


_TEXTS_JS = """() => {
  const found = [];
  for (const element of document.querySelectorAll('main, main *')) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!own || element.closest('svg')) continue;
    let behind = element;
    while (getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
    found.push([own.slice(0, 40), getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]);
  }
  return found;
}"""


def _luminance(colour: str) -> float:
    """Return the relative luminance as defined by WCAG."""
    linear = []
    for part in re.findall(r"[\d.]+", colour)[:3]:
        share = float(part) / 255
        linear.append(share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("javascript", [True, False])
def test_page_fits_phone_screen(scene: StatusScene, *, javascript: bool) -> None:
    """At a width of 360 pixels nothing is cut off or scrolls sideways.

    This holds for the longest caller name too, and the page does not need JavaScript.
    """
    phone = {"width": 360, "height": 740}
    with _page(scene, viewport=phone, java_script_enabled=javascript, is_mobile=True) as page:
        boxes = page.locator("main *:not(svg *)").evaluate_all(
            "all => all.map(e => [e.outerHTML.slice(0, 60), e.getBoundingClientRect()])"
            ".filter(([, box]) => box.width).map(([what, box]) => [what, box.left, box.right])"
        )
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert page.locator("#hit-rate").is_visible()
    assert wide == 360
    assert [box for box in boxes if box[1] < 0 or box[2] > 360] == []


@pytest.mark.slow
def test_hostile_caller_name_is_shown_as_text(scene: StatusScene) -> None:
    """No script runs and nothing is loaded, even without the content security policy."""
    _wait_for_fleet_report(scene, scene.http_url)
    context = scene.browser.new_context()
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.goto(scene.http_url)
    assert HOSTILE in page.locator("#callers bdi").all_inner_texts()
    assert page.title() == "Seniority cache"
    assert page.locator("img").count() == 0
    assert problems == []
    context.close()


@pytest.mark.slow
def test_page_loads_only_itself_and_refreshes_in_place(scene: StatusScene) -> None:
    """It requests only its own replica, and replaces its content without reloading."""
    context = scene.browser.new_context()
    page = context.new_page()
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request))  # noqa: PLW0108 - no builtin will do
    page.goto(scene.http_url)
    page.evaluate("window.same = true")
    shown = page.inner_text("header .sub")
    page.wait_for_function("shown => document.querySelector('header .sub').innerText !== shown", arg=shown)
    assert page.evaluate("window.same")
    assert len(requests) > 1
    assert {request.url for request in requests if not request.url.startswith("data:")} == {
        f"{scene.http_url}/"
    }
    headers = requests[0].response()
    assert headers
    assert headers.header_value("x-content-type-options") == "nosniff"
    assert headers.header_value("cache-control") == "no-store"
    context.close()


@pytest.mark.slow
def test_redis_is_read_at_most_once_a_second(scene: StatusScene) -> None:
    """However many viewers there are."""
    node: Any = SimpleNamespace(database=0)
    metrics: Any = ProxyMetrics
    scripts = Scripts(node, QueueKeys(prefix="p", namespace="n"), metrics=metrics)
    reading = scripts._scripts["snapshot"].sha
    with scene.fleet.redis.record_client_commands() as commands:
        began_at = _read_status(scene.http_url)["at_seconds"]
        views = 1
        seconds = 0.0
        while seconds < VIEWING_SECONDS:
            views += 1
            seconds = _read_status(scene.http_url)["at_seconds"] - began_at
    reads = sum(reading in command for command in commands)
    assert 1 <= reads <= seconds + 2
    assert views > reads


@pytest.mark.slow
def test_page_shows_single_replica_while_redis_is_lost(scene: StatusScene) -> None:
    """The open page states the reason, and shows the fleet again once Redis is back."""
    with _page(scene) as page:
        scene.fleet.redis.kill()
        _wait_for_scope(scene, "redis lost")
        page.evaluate(_REFRESH_JS)
        page.wait_for_selector("#alone", timeout=60_000)
        assert "these figures are of this replica alone" in page.inner_text("#alone")
        assert page.inner_text("#store") == "cannot be reached"
        assert page.inner_text("#state") == "Degraded: without its store"
        assert "this replica, last 10 min" in page.inner_text("section:first-of-type")
        assert "ConnectionError" in page.inner_text("dl")
        scene.fleet.redis.start()
        _wait_for_scope(scene, "fleet")
        page.evaluate(_REFRESH_JS)
        page.wait_for_selector("#alone", state="detached", timeout=60_000)
        assert "fleet, last 10 min" in page.inner_text("section:first-of-type")


_REFRESH_JS = "document.dispatchEvent(new Event('visibilitychange'))"


def _wait_for_scope(scene: StatusScene, scope: str) -> None:
    wait_for(
        lambda: _read_status(scene.http_url)["scope"] == scope,
        timeout_seconds=60,
        description=f"figures are status of: {scope}",
    )


def test_page_and_json_without_shared_redis(stage: ProxyEnvironment) -> None:
    """With `memory:` both are served, and state that they are about this replica only."""
    stage.caller.infer(make_pairs("status", 3), metadata=[("x-caller", "page")])
    with urlopen(f"{stage.proxy.http_url}/", timeout=30) as response:
        page = response.read().decode()
        headers = dict(response.headers)
    assert "these figures are of this replica alone" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Content-Type"] == "text/html; charset=utf-8"

    def counted() -> bool:
        return any(line["name"] == "page" for line in _read_status(stage.proxy.http_url)["callers"])

    wait_for(counted, description="the page counts the request")
    assert _read_status(stage.proxy.http_url)["scope"] == "not shared"
