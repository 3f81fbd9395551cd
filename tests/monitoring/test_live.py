"""Dashboards and alerts on a real Prometheus that scrapes real services under a scripted load."""

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
from tests.monitoring.test_rules import load_alerts
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
    # A busy machine must not look like a lost Redis.
    "10s",
)
_FAILED_PAIRS = 1
_INCREASE = re.compile(r"increase\(([^\[\]]+)\[\w+\]\)")
_COMPARISON = re.compile(r"\s(>=|<=|==|!=|>|<)\s")


@dataclass
class MonitoringScene:
    """A fleet and its Prometheus after a load.

    `started_at` is when everything had been scraped once, `ended_at` when everything had been scraped again
    after the load. In between the stub had `calls`.
    """

    fleet: Fleet
    prometheus: PrometheusServer
    started_at: float
    ended_at: float = 0.0
    calls: tuple[LoggedCall, ...] = ()
    pairs: int = 0
    hits: int = 0

    def fill_variables(self, expr: str) -> str:
        """Replace the variables of Grafana: all deployments, and a window that covers the load."""
        window = f"{round(self.ended_at - self.started_at) + 5}s"
        for name in ("$__rate_interval", "$__range"):
            expr = expr.replace(name, window)
        return re.sub(r"\$(namespace|job|caller)\b", ".*", expr)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoringScene]:
    """Run two proxies on one Redis, a stub and an augmenter under load. Alerts fire without delay."""
    folder = tmp_path_factory.mktemp("scene")
    rules = folder / "rules.yaml"
    rules.write_text(re.sub(r"(?m)^(\s+for:) \w+", r"\1 0s", RULES.read_text(encoding="utf-8")))
    postings = folder / "raw"
    postings.mkdir()
    with ExitStack() as stack:
        running = stack.enter_context(
            fleet(folder, "--max-batch", str(_BATCH_PAIRS), "--fail", "poison-named=BAD")
        )
        proxies = running.start_replicas(2, *_FLAGS)
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
        prometheus = stack.enter_context(prometheus_server(folder, jobs, rules=rules))
        loaded = MonitoringScene(running, prometheus, started_at=time.time())
        _run_load(loaded, postings, folder / "mod", f"http://{augmenter}")
        yield loaded


def _run_load(scene: MonitoringScene, postings: Path, augmented: Path, augmenter: str) -> None:
    """Send new pairs, cached ones, the same pairs concurrently to two replicas, a bad one, and files."""
    first, second = scene.fleet.proxies
    with open_caller(first.target) as one, open_caller(second.target) as other:
        night = [("x-caller", "night"), ("x-priority", "bulk")]
        known, shared = make_pairs("known", 500), make_pairs("shared", 300)
        replies = [one.infer(known, metadata=night), one.infer(known), other.infer(known)]
        concurrent = [caller.start_infer(shared, metadata=[("x-caller", "web")]) for caller in (one, other)]
        replies += [reply.result() for reply in concurrent]
        assert other.infer([("BAD", "title")]).code.name == "INVALID_ARGUMENT"
        # The series of the callers exist now, so that what follows is a rate.
        scene.prometheus.wait_scraped(since=time.time())
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
    # Twice, because the rate of a new series needs two samples.
    scene.prometheus.wait_scraped(since=time.time())
    scene.prometheus.wait_scraped(since=time.time())
    scene.ended_at = time.time()


@pytest.mark.parametrize("query", dashboard_queries(), ids=lambda query: query.location)
def test_every_panel_has_data(scene: MonitoringScene, query: Query) -> None:
    """Each query returns numbers after a load with a bit of everything."""
    samples = scene.prometheus.query(scene.fill_variables(query.expr), unix_seconds=scene.ended_at)
    assert samples
    assert not all(math.isnan(sample.value) for sample in samples)


@pytest.mark.parametrize("name", sorted(load_alerts().keys() - {"CacheProxyNoReplicas"}))
def test_every_alert_reads_existing_data(scene: MonitoringScene, name: str) -> None:
    """With comparisons that return 0 or 1, the expression of an alert returns a value."""
    expr = _COMPARISON.sub(r" \1 bool ", load_alerts()[name]["expr"])
    assert " bool " in expr
    assert scene.prometheus.query(expr, unix_seconds=scene.ended_at)


def _panel_value(scene: MonitoringScene, title: str) -> float:
    """Return the exact value of a panel.

    The counters started at 0 with their processes, so their values are exact. `increase` extrapolates by up
    to a scrape interval.
    """
    [expr] = {
        query.expr for query in dashboard_queries() if query.dashboard == "operator" and query.panel == title
    }
    expr = scene.fill_variables(expr)
    extrapolated = scene.prometheus.query_value(expr, unix_seconds=scene.ended_at)
    exact = scene.prometheus.query_value(_INCREASE.sub(r"(\1)", expr), unix_seconds=scene.ended_at)
    assert extrapolated == pytest.approx(exact, rel=0.3)
    return exact


def test_main_panels_equal_log_of_stub(scene: MonitoringScene) -> None:
    """Calls, pairs and mean batch are those of the log, and what was saved is what it never received."""
    sent = sum(len(call.pairs) for call in scene.calls)
    assert len(scene.calls) > 8
    assert _panel_value(scene, "Model calls") == len(scene.calls)
    assert _panel_value(scene, "Pairs to the model") == sent
    mean = sent / len(scene.calls)
    assert _panel_value(scene, "Mean batch") == pytest.approx(mean)
    assert _panel_value(scene, "Slot use") == pytest.approx(mean / _BATCH_PAIRS)
    saved = (scene.pairs - _FAILED_PAIRS - sent) / _BATCH_PAIRS
    assert _panel_value(scene, "Model calls saved") == pytest.approx(saved)
    assert _panel_value(scene, "Hit rate") == pytest.approx(scene.hits / scene.pairs)


def test_outcomes_add_up_to_requested_pairs(scene: MonitoringScene) -> None:
    """The hits are those of the trailers."""
    counted = {
        sample.labels["outcome"]: sample.value
        for sample in scene.prometheus.query(
            "sum by (outcome) (cache_proxy_pairs_total)", unix_seconds=scene.ended_at
        )
    }
    assert sum(counted.values()) == scene.pairs
    assert counted["l1"] + counted["l2"] + counted["stale"] == scene.hits
    assert counted["failed"] == _FAILED_PAIRS
    by_caller = "sum(cache_proxy_caller_pairs_total)"
    assert scene.prometheus.query_value(by_caller, unix_seconds=scene.ended_at) == scene.pairs


def test_alerts_fire_after_loss_of_redis_and_proxies(scene: MonitoringScene) -> None:
    """First degraded, and not before Redis is lost. Then down, and without replicas."""
    firing = scene.prometheus.firing_alerts
    wait_for(lambda: "AugmenterFilesFailed" in firing(), description="the alert of the broken file")
    assert not firing() & {"CacheProxyDegraded", "CacheProxyDown", "CacheProxyNoReplicas"}
    scene.fleet.redis.kill()
    wait_for(lambda: "CacheProxyDegraded" in firing(), description="the alert of the lost Redis")
    for proxy in scene.fleet.proxies:
        proxy.process.kill()
    wait_for(
        lambda: firing() >= {"CacheProxyDown", "CacheProxyNoReplicas"},
        description="the alerts of the killed proxies",
    )
