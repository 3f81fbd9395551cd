"""The status page as an operator sees it: a real browser, two replicas, their Redis, and the model's log."""

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
LOOKING_SECONDS = 2.0
FAST = ("--model-rate", "50000", "--model-calls-per-second", "50")
LOOKS = ("light", "dark")
CALLERS = ("plain", HOSTILE)


@dataclass(frozen=True)
class Asked:
    """What callers were told, in all."""

    requests: int
    hits: int
    misses: int


@dataclass(frozen=True)
class Scene:
    """A fleet of two replicas that have answered, what they answered, and a browser."""

    fleet: Fleet
    asked: Asked
    browser: Browser

    @property
    def http(self) -> str:
        """The first replica's page."""
        return self.fleet.proxies[0].http_url


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Each of two callers has asked each of two replicas for 300 pairs, of which the two share the half."""
    with chromium() as browser, fleet(tmp_path_factory.mktemp("status")) as running:
        requests = hits = misses = 0
        for proxy in running.start_replicas(2, *FAST):
            with open_caller(proxy.target) as asking:
                for name in CALLERS:
                    for prefix in ("all", name[:5]):
                        reply = asking.infer(make_pairs(prefix, 150), metadata=[("x-caller", name)])
                        requests, hits, misses = requests + 1, hits + reply.hits, misses + reply.misses
        yield Scene(running, Asked(requests, hits, misses), browser)


@contextmanager
def _page(scene: Scene, url: str | None = None, **options: Any) -> Iterator[Page]:
    context = scene.browser.new_context(**options)
    try:
        page = context.new_page()
        page.goto(url or scene.http)
        yield page
    finally:
        context.close()


def _told(http: str) -> dict[str, Any]:
    with urlopen(f"{http}/status.json", timeout=30) as response:
        told: dict[str, Any] = json.load(response)
    return told


def _wait_for_fleet(scene: Scene, http: str) -> dict[str, Any]:
    """What a replica tells once all reports have arrived."""

    def complete() -> dict[str, Any] | None:
        told = _told(http)
        pairs = told["total"]["hits"] + told["total"]["inferred"] + told["total"]["coalesced"]
        arrived = pairs >= scene.asked.hits + scene.asked.misses and told["total"]["calls"]
        return told if told["scope"] == "fleet" and arrived else None

    found: dict[str, Any] = wait_for(
        complete, timeout_seconds=60, description="both replicas' figures are told"
    )
    return found


def _words(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\u00a0", " ")).strip()


@pytest.mark.slow
def test_every_replica_tells_the_fleets_figures(scene: Scene) -> None:
    """On both replicas pairs, hits, calls and callers are what trailers and the model's own log say."""
    calls = scene.fleet.model_calls
    for proxy in scene.fleet.proxies:
        told = _wait_for_fleet(scene, proxy.http_url)
        total = told["total"]
        assert (total["requests"], total["hits"]) == (scene.asked.requests, scene.asked.hits)
        assert total["inferred"] + total["coalesced"] == scene.asked.misses
        assert (total["calls"], total["sent"]) == (len(calls), sum(len(call.pairs) for call in calls))
        assert {line["name"]: line["pairs"] for line in told["callers"]} == dict.fromkeys(CALLERS, 600)
        assert (told["live_replicas"], told["silent_replicas"]) == (2, 0)
        assert told["calls_saved"] == scene.asked.requests - len(calls)
        with _page(scene, proxy.http_url) as page:
            rate = scene.asked.hits / (scene.asked.hits + scene.asked.misses)
            assert _words(page.inner_text("#hit-rate")) == f"{int(rate * 1000) / 10} %"
            assert _words(page.inner_text("#calls-saved")) == str(told["calls_saved"])
            assert _words(page.inner_text("#calls-made")) == str(len(calls))
            assert _words(page.inner_text("#live-replicas")) == "2 live"
            assert page.inner_text("#state") == "Working"
            assert page.locator("#alone").count() == 0
            assert page.locator("#queue tbody tr").count() == 3
            assert page.locator("rect.filled").count() > 1


@pytest.mark.slow
def test_what_a_dead_replica_counted_is_still_told(scene: Scene) -> None:
    """A third one answers, reports, and is killed: the others tell what it counted, and that they are two."""
    before = _wait_for_fleet(scene, scene.http)["total"]
    third = scene.fleet.start_replica(*FAST)
    with open_caller(third.target) as asking:
        asking.infer(make_pairs("all", 150), metadata=[("x-caller", CALLERS[0])])

    def counted() -> bool:
        return bool(_told(scene.http)["total"]["hits"] == before["hits"] + 150)

    wait_for(counted, timeout_seconds=60, description="the third replica has reported")
    third.stop(signal.SIGKILL)
    scene.fleet.proxies.remove(third)
    told = wait_for(
        lambda: (found := _told(scene.http))["live_replicas"] == 2 and found,
        timeout_seconds=60,
        description="it is missed",
    )
    assert told["total"]["hits"] == before["hits"] + 150


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_every_text_can_be_read(scene: Scene, look: str) -> None:
    """In either colour scheme each text has a contrast of 4.5 and more with what is behind it, and the ground
    is light or dark as it was asked for.
    """  # noqa: D205 - one thought
    with _page(scene, color_scheme=look) as page:
        texts = page.evaluate(_TEXTS_JS)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (_luminance(ground) > 0.5) == (look == "light")
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
    """Relative, as WCAG has it."""
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
def test_it_can_be_read_on_a_phone(scene: Scene, *, javascript: bool) -> None:
    """360 pixels wide nothing is cut off or needs scrolling aside, also with the longest caller's name, and
    without JavaScript.
    """  # noqa: D205 - one thought
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
def test_a_hostile_caller_changes_nothing_but_its_line(scene: Scene) -> None:
    """A name that is a script and an image stays a name: nothing runs, nothing is loaded, and the policy was
    not even needed.
    """  # noqa: D205 - one thought
    _wait_for_fleet(scene, scene.http)
    context = scene.browser.new_context()
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(scene.http)
    assert HOSTILE in page.locator("#callers bdi").all_inner_texts()
    assert page.title() == "Seniority cache"
    assert page.locator("img").count() == 0
    assert complaints == []
    context.close()


@pytest.mark.slow
def test_it_stays_with_its_origin_and_renews_itself(scene: Scene) -> None:
    """The page asks its own replica for itself, time and again, and nobody else for anything; the figures are
    exchanged in place, so what was opened or scrolled stays as it was.
    """  # noqa: D205 - one thought
    context = scene.browser.new_context()
    page = context.new_page()
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request))  # noqa: PLW0108 - no builtin will do
    page.goto(scene.http)
    page.evaluate("window.same = true")
    shown = page.inner_text("header .sub")
    page.wait_for_function("shown => document.querySelector('header .sub').innerText !== shown", arg=shown)
    assert page.evaluate("window.same")
    assert len(requests) > 1
    assert {request.url for request in requests if not request.url.startswith("data:")} == {f"{scene.http}/"}
    headers = requests[0].response()
    assert headers
    assert headers.header_value("x-content-type-options") == "nosniff"
    assert headers.header_value("cache-control") == "no-store"
    context.close()


@pytest.mark.slow
def test_any_number_of_viewers_cost_redis_one_read_a_second(scene: Scene) -> None:
    """One look after the other: Redis is read as often as seconds passed, and once more."""
    home: Any = SimpleNamespace(database=0)
    metrics: Any = ProxyMetrics
    scripts = Scripts(home, QueueKeys(prefix="p", namespace="n"), metrics=metrics)
    reading = scripts._scripts["snapshot"].sha
    with scene.fleet.redis.record_client_commands() as commands:
        began_at = _told(scene.http)["at_seconds"]
        looks, seconds = 1, 0.0
        while seconds < LOOKING_SECONDS:
            looks, seconds = looks + 1, _told(scene.http)["at_seconds"] - began_at
    reads = sum(reading in command for command in commands)
    assert 1 <= reads <= seconds + 2
    assert looks > reads


@pytest.mark.slow
def test_without_redis_it_says_whose_figures_it_shows(scene: Scene) -> None:
    """Redis is killed under the open page: it says that the figures are of this replica alone, and why; when
    Redis is back they are the fleet's again.
    """  # noqa: D205 - one thought
    with _page(scene) as page:
        scene.fleet.redis.kill()
        _wait_for_scope(scene, "redis lost")
        page.evaluate(_LOOK_AGAIN_JS)
        page.wait_for_selector("#alone", timeout=60_000)
        assert "these figures are of this replica alone" in page.inner_text("#alone")
        assert page.inner_text("#store") == "cannot be reached"
        assert page.inner_text("#state") == "Degraded: without its store"
        assert "this replica, last 10 min" in page.inner_text("section:first-of-type")
        assert "ConnectionError" in page.inner_text("dl")
        scene.fleet.redis.start()
        _wait_for_scope(scene, "fleet")
        page.evaluate(_LOOK_AGAIN_JS)
        page.wait_for_selector("#alone", state="detached", timeout=60_000)
        assert "fleet, last 10 min" in page.inner_text("section:first-of-type")


_LOOK_AGAIN_JS = "document.dispatchEvent(new Event('visibilitychange'))"


def _wait_for_scope(scene: Scene, scope: str) -> None:
    wait_for(
        lambda: _told(scene.http)["scope"] == scope,
        timeout_seconds=60,
        description=f"figures are told of: {scope}",
    )


def test_the_page_and_its_data_of_one_process(stage: ProxyEnvironment) -> None:
    """With `memory:` they are there too, for GET alone, and say that the figures are of this replica."""
    stage.caller.infer(make_pairs("status", 3), metadata=[("x-caller", "page")])
    with urlopen(f"{stage.proxy.http_url}/", timeout=30) as response:
        page = response.read().decode()
        headers = dict(response.headers)
    assert "these figures are of this replica alone" in page
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Content-Type"] == "text/html; charset=utf-8"

    def counted() -> bool:
        return any(line["name"] == "page" for line in _told(stage.proxy.http_url)["callers"])

    wait_for(counted, description="the page counts the request")
    assert _told(stage.proxy.http_url)["scope"] == "not shared"
