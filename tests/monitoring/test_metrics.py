"""The names, types and labels that dashboards and alerts rely on."""

from functools import cache

import pytest
from prometheus_client import CollectorRegistry

from scripts.metrics import MetricDescription, describe_metrics
from services.cache_proxy.observability.metrics import ProxyMetrics

_PRIORITIES = {"interactive", "bulk", "refresh"}
# Values that are not fixed.
_ANY: set[str] = set()
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
def _metrics_by_name() -> dict[str, MetricDescription]:
    return {metric.name: metric for metric in describe_metrics()}


@pytest.mark.parametrize("name", _PROMISED)
def test_promised_metric_exists(name: str) -> None:
    """With its type, labels and their values, before any load."""
    kind, labels = _PROMISED[name]
    metric = _metrics_by_name()[name]
    assert metric.kind == kind
    assert metric.labels.keys() == labels.keys()
    for label, values in labels.items():
        assert values in (_ANY, metric.labels[label])


@pytest.mark.parametrize("name", _metrics_by_name())
def test_every_metric_has_meaning_and_reading(name: str) -> None:
    """The page of metrics is generated from the help texts."""
    assert _metrics_by_name()[name].meaning
    assert _metrics_by_name()[name].reading.endswith(".")


@pytest.mark.parametrize(("calls", "expected"), [(0, 1000), (1, 300), (10, 1000)])
def test_limit_in_pairs_is_minimum_of_rate_and_calls(calls: float, expected: float) -> None:
    """Dashboards show shares of this limit."""
    registry = CollectorRegistry()
    set_limit_gauges = ProxyMetrics(registry).set_limit_gauges
    set_limit_gauges(calls_per_second=calls, pairs_per_second=1000, batch_pairs=300, queued_pairs=1)
    assert registry.get_sample_value("cache_proxy_limit_pairs_per_second") == expected
