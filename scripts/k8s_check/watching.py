"""Check that Prometheus scrapes existing ports and queries existing metrics."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry

from scripts.k8s_check.build import Manifest
from scripts.k8s_check.objects import containers, name_of, of_kind, selects
from services.augmenter.metrics import Metrics
from services.cache_proxy.observability.metrics import ProxyMetrics

_METRIC_NAME = re.compile(r"(?<![\w:])(?:cache_proxy|augmenter)_[a-z0-9_]+(?![\w:])")
_STRING_LITERAL = re.compile(r'"[^"]*"|\'[^\']*\'')
_SAMPLES = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}


def check(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Yield the findings of one build."""
    for monitor in of_kind(manifests, "PodMonitor", "ServiceMonitor"):
        yield from _check_monitor(monitor, manifests)
    known = metric_names()
    for owner, query in _queries(manifests):
        for name in sorted(set(_METRIC_NAME.findall(_STRING_LITERAL.sub("", query))) - known):
            yield f"{owner}: there is no metric {name}"


def metric_names() -> set[str]:
    """Return the names of all samples that a scrape of either service may return."""
    registry = CollectorRegistry()
    ProxyMetrics(registry)
    Metrics(registry)
    return {
        f"{family.name}{ending}"
        for family in registry.collect()
        for ending in _SAMPLES.get(family.type, [""])
    }


def _check_monitor(monitor: Manifest, manifests: Sequence[Manifest]) -> Iterator[str]:
    spec = monitor["spec"]
    if monitor["kind"] == "PodMonitor":
        found = [one for one in containers(manifests) if selects(spec["selector"], one.pod.labels)]
        ports = {port["name"] for container in found for port in container.spec.get("ports", ())}
        wanted = {endpoint["port"] for endpoint in spec["podMetricsEndpoints"]}
    else:
        services = [
            service
            for service in of_kind(manifests, "Service")
            if selects(spec["selector"], service["metadata"].get("labels", {}))
        ]
        ports = {port["name"] for service in services for port in service["spec"]["ports"]}
        wanted = {endpoint["port"] for endpoint in spec["endpoints"]}
    for port in sorted(wanted - ports):
        yield f"{name_of(monitor)}: nothing that it selects has a port {port}"


def _queries(manifests: Sequence[Manifest]) -> Iterator[tuple[str, str]]:
    """Yield every PromQL expression with the name of its object."""
    for rules in of_kind(manifests, "PrometheusRule"):
        for group in rules["spec"]["groups"]:
            yield from ((name_of(rules), str(rule["expr"])) for rule in group["rules"])
    for dashboard in of_kind(manifests, "ConfigMap"):
        for key, text in dashboard.get("data", {}).items():
            if key.endswith(".json"):
                yield from (
                    (f"{name_of(dashboard)}/{key}", query) for query in _expressions(json.loads(text))
                )


def _expressions(value: Any) -> Iterator[str]:
    """Yield the queries of the panels and variables of a dashboard."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in {"expr", "query", "definition"} and isinstance(inner, str):
                yield inner
            else:
                yield from _expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _expressions(inner)
