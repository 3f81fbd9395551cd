"""Dashboards and alerts over a real Prometheus, which scrapes real services under a scripted load."""

import gzip
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.monitoring.queries import RULES, Query, dashboard_queries
from tests.monitoring.test_rules import alerts
from tests.support.augmenter_process import augmenter_process
from tests.support.call_log import LoggedCall
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.fleet import Fleet, fleet
from tests.support.prometheus_server import PrometheusServer, prometheus_server
from tests.support.redis_server import free_port, wait_for

pytestmark = pytest.mark.slow

_BATCH_PAIRS = 100
_FLAGS = (
    "--model-calls-per-second",
    "10",
    "--model-rate",
    "1000",
    "--model-batch-size",
    str(_BATCH_PAIRS),
    "--cache-timeout",
    "10s",  # a busy machine does not make it a Redis that is lost
)
_FAILED_PAIRS = 1
_INCREASE = re.compile(r"increase\(([^\[\]]+)\[\w+\]\)")
_COMPARISON = re.compile(r"\s(>=|<=|==|!=|>|<)\s")


@dataclass
class Scene:
    """`began`: everything had been scraped once; `at`: the load was over, and everything scraped again.

    In between the stub had these calls.
    """

    fleet: Fleet
    prometheus: PrometheusServer
    began: float
    at: float = 0.0
    calls: tuple[LoggedCall, ...] = ()
    pairs: int = 0
    hits: int = 0

    def filled(self, expr: str) -> str:
        """With values for Grafana's variables: all deployments, and a window from the beginning on."""
        window = f"{round(self.at - self.began) + 5}s"
        for name in ("$__rate_interval", "$__range"):
            expr = expr.replace(name, window)
        return re.sub(r"\$(namespace|job|caller)\b", ".*", expr)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Two proxies on one Redis, a stub and an augmenter, after the load; the alerts wait for nothing."""
    folder = tmp_path_factory.mktemp("scene")
    rules = folder / "rules.yaml"
    rules.write_text(re.sub(r"(?m)^(\s+for:) \w+", r"\1 0s", RULES.read_text(encoding="utf-8")))
    postings = folder / "raw"
    postings.mkdir()
    with ExitStack() as stack:
        whole = stack.enter_context(
            fleet(folder, "--max-batch", str(_BATCH_PAIRS), "--fail", "poison-named=BAD")
        )
        proxies = whole.start_replicas(2, *_FLAGS)
        augmenter = f"127.0.0.1:{free_port()}"
        stack.enter_context(
            augmenter_process(
                postings,
                folder / "mod",
                "--target",
                proxies[0].target,
                "--watch",
                "--poll-interval",
                "1s",
                "--http-listen",
                augmenter,
            )
        )
        jobs = {
            "cache-proxy": [proxy.http_url.removeprefix("http://") for proxy in proxies],
            "augmenter": [augmenter],
        }
        watching = stack.enter_context(prometheus_server(folder, jobs, rules=rules))
        made = Scene(whole, watching, began=time.time())
        _load(made, postings, folder / "mod", f"http://{augmenter}")
        yield made


def _load(scene: Scene, postings: Path, augmented: Path, augmenter: str) -> None:
    """New pairs, known ones from L1 and L2, the same from two sides at once, a bad one, files."""
    first, second = scene.fleet.proxies
    with open_caller(first.target) as one, open_caller(second.target) as other:
        night = [("x-caller", "night"), ("x-priority", "bulk")]
        known, shared = make_pairs("known", 500), make_pairs("shared", 300)
        replies = [one.infer(known, metadata=night), one.infer(known), other.infer(known)]
        at_once = [asking.start_infer(shared, metadata=[("x-caller", "web")]) for asking in (one, other)]
        replies += [asked.result() for asked in at_once]
        assert other.infer([("BAD", "title")]).code.name == "INVALID_ARGUMENT"
        scene.prometheus.wait_scraped(since=time.time())  # callers are known now: what follows is a rate
        replies += [one.infer(known, metadata=night), other.infer(shared, metadata=[("x-caller", "web")])]
    scene.pairs = 4 * len(known) + 3 * len(shared) + _FAILED_PAIRS
    scene.hits = sum(reply.hits for reply in replies)

    lines = [{"company": company, "title": title} for company, title in known[:50] + make_pairs("filed", 150)]
    text = "\n".join(["", *map(json.dumps, lines), "no posting"])
    (postings / "1714605540.jsonl").write_text(text)
    (postings / "1714605600.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-9])
    wait_for((augmented / "1714605540.jsonl").exists, description="the file is augmented")
    failed = ("augmenter_files_total", "failed")
    wait_for(lambda: read_metrics(augmenter)[failed], description="the broken file has failed")
    scene.pairs += len(lines)
    scene.hits += 50

    scene.calls = tuple(scene.fleet.model_calls)
    scene.prometheus.wait_scraped(since=time.time())  # twice: a rate needs two of what is new
    scene.prometheus.wait_scraped(since=time.time())
    scene.at = time.time()


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.location)
def test_every_panel_has_data(scene: Scene, query: Query) -> None:
    """Each query of each dashboard gives numbers after a load that had a bit of everything."""
    samples = scene.prometheus.query(scene.filled(query.expr), unix_seconds=scene.at)
    assert samples
    assert not all(math.isnan(sample.value) for sample in samples)


@pytest.mark.parametrize("name", sorted(alerts().keys() - {"CacheProxyNoReplicas"}))
def test_every_alert_looks_at_data(scene: Scene, name: str) -> None:
    """With its comparisons made to tell 0 or 1, an alert's expression gives either: it is not blind."""
    expr = _COMPARISON.sub(r" \1 bool ", alerts()[name]["expr"])
    assert " bool " in expr
    assert scene.prometheus.query(expr, unix_seconds=scene.at)


def _headline(scene: Scene, title: str) -> float:
    """What the panel tells, but exactly: since their processes' start, and so since 0, its counters gained.

    `increase` prolongs what it has seen by up to a scrape's interval, to the end of the window.
    """
    [expr] = {
        query.expr for query in dashboard_queries() if query.dashboard == "operator" and query.panel == title
    }
    expr = scene.filled(expr)
    roughly = scene.prometheus.query_value(expr, unix_seconds=scene.at)
    exactly = scene.prometheus.query_value(_INCREASE.sub(r"(\1)", expr), unix_seconds=scene.at)
    assert roughly == pytest.approx(exactly, rel=0.3)
    return exactly


def test_the_headlines_are_the_stubs_own_numbers(scene: Scene) -> None:
    """Calls, pairs and mean batch are those of its log; what was saved, those that it was never sent."""
    sent = sum(len(call.pairs) for call in scene.calls)
    assert len(scene.calls) > 8
    assert _headline(scene, "Model calls") == len(scene.calls)
    assert _headline(scene, "Pairs to the model") == sent
    mean = sent / len(scene.calls)
    assert _headline(scene, "Mean batch") == pytest.approx(mean)
    assert _headline(scene, "Slot use") == pytest.approx(mean / _BATCH_PAIRS)
    saved = (scene.pairs - _FAILED_PAIRS - sent) / _BATCH_PAIRS
    assert _headline(scene, "Model calls saved") == pytest.approx(saved)
    assert _headline(scene, "Hit rate") == pytest.approx(scene.hits / scene.pairs)


def test_every_pair_is_counted_once(scene: Scene) -> None:
    """All outcomes together are what callers sent; those of a cache, what the trailers said."""
    counted = {
        sample.labels["outcome"]: sample.value
        for sample in scene.prometheus.query(
            "sum by (outcome) (cache_proxy_pairs_total)", unix_seconds=scene.at
        )
    }
    assert sum(counted.values()) == scene.pairs
    assert counted["l1"] + counted["l2"] + counted["stale"] == scene.hits
    assert counted["failed"] == _FAILED_PAIRS
    by_caller = "sum(cache_proxy_caller_pairs_total)"
    assert scene.prometheus.query_value(by_caller, unix_seconds=scene.at) == scene.pairs


def test_alerts_fire_when_redis_and_then_the_proxies_go(scene: Scene) -> None:
    """Degraded without Redis, and not before; then down, and without replicas."""
    firing = scene.prometheus.firing_alerts
    wait_for(lambda: "AugmenterFilesFailed" in firing(), description="the broken file is told")
    assert not firing() & {"CacheProxyDegraded", "CacheProxyDown", "CacheProxyNoReplicas"}
    scene.fleet.redis.kill()
    wait_for(lambda: "CacheProxyDegraded" in firing(), description="degraded is told")
    for proxy in scene.fleet.proxies:
        proxy.process.kill()
    wait_for(lambda: firing() >= {"CacheProxyDown", "CacheProxyNoReplicas"}, description="their end is told")
