"""What dashboards and alerts may rely on: names, types and labels."""

from functools import cache

import pytest
from prometheus_client import CollectorRegistry

from scripts.metrics import MetricDescription, describe_metrics
from services.cache_proxy.observability.metrics import ProxyMetrics

_PRIORITIES = {"interactive", "bulk", "refresh"}
_ANY: set[str] = set()  # values that nobody fixed
_PROMISED: dict[str, tuple[str, dict[str, set[str]]]] = {
    "cache_proxy_requests_total": ("counter", {"code": _ANY}),
    "cache_proxy_request_duration_seconds": ("histogram", {}),
    "cache_proxy_pairs_total": (
        "counter",
        {"outcome": {"l1", "l2", "stale", "coalesced", "inferred", "failed"}},
    ),
    "cache_proxy_caller_pairs_total": ("counter", {"caller": _ANY, "outcome": {"hit", "miss", "failed"}}),
    "cache_proxy_model_calls_total": ("counter", {"code": _ANY}),
    "cache_proxy_model_pairs_total": ("counter", {}),
    "cache_proxy_model_batch_pairs": ("histogram", {}),
    "cache_proxy_model_duration_seconds": ("histogram", {}),
    "cache_proxy_queue_pairs": ("gauge", {"priority": _PRIORITIES}),
    "cache_proxy_queue_global_pairs": ("gauge", {"priority": _PRIORITIES}),
    "cache_proxy_queue_oldest_seconds": ("gauge", {}),
    "cache_proxy_slot_wait_duration_seconds": ("histogram", {}),
    "cache_proxy_store_duration_seconds": ("histogram", {"op": _ANY}),
    "cache_proxy_store_up": ("gauge", {}),
    "cache_proxy_degraded": ("gauge", {}),
    "cache_proxy_live_replicas": ("gauge", {}),
    "cache_proxy_store_garbage_total": ("counter", {}),
    "cache_proxy_l1_bytes": ("gauge", {}),
    "cache_proxy_l1_entries": ("gauge", {}),
    "cache_proxy_build_info": ("gauge", {"version": _ANY}),
    "augmenter_build_info": ("gauge", {"version": _ANY}),
    "augmenter_files_total": ("counter", {"outcome": {"done", "skipped", "failed"}}),
    "augmenter_lines_total": ("counter", {"outcome": {"augmented", "rejected", "blank"}}),
    "augmenter_file_duration_seconds": ("histogram", {}),
    "augmenter_rpc_duration_seconds": ("histogram", {}),
    "augmenter_backlog_files": ("gauge", {}),
}


@cache
def _told() -> dict[str, MetricDescription]:
    return {metric.name: metric for metric in describe_metrics()}


@pytest.mark.parametrize("name", _PROMISED)
def test_what_is_promised_is_there(name: str) -> None:
    """By name, type, labels and their values, before any load."""
    kind, labels = _PROMISED[name]
    told = _told()[name]
    assert told.kind == kind
    assert told.labels.keys() == labels.keys()
    for label, values in labels.items():
        assert values in (_ANY, told.labels[label])


@pytest.mark.parametrize("name", _told())
def test_every_metric_says_what_it_means(name: str) -> None:
    """A page made of the help texts is only as good as they are: each tells something, and how to read it."""
    assert _told()[name].meaning
    assert _told()[name].reading.endswith(".")


@pytest.mark.parametrize(("calls", "told"), [(0, 1000), (1, 300), (10, 1000)])
def test_the_limit_in_pairs_is_the_lesser_of_two(calls: float, told: float) -> None:
    """Of the rate and what the calls hold, where calls are limited at all: shares are taken of it."""
    registry = CollectorRegistry()
    limits = ProxyMetrics(registry).set_limit_gauges
    limits(calls_per_second=calls, pairs_per_second=1000, batch_pairs=300, queued_pairs=1)
    assert registry.get_sample_value("cache_proxy_limit_pairs_per_second") == told
