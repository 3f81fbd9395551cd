"""The RPC metrics, as they are collected."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram

from services.cache_proxy.observability.rpc_metrics import RpcMetrics

_BUCKETS = (0.001, 0.01, 0.1, 1)


def _metrics(registry: CollectorRegistry) -> RpcMetrics:
    return RpcMetrics(registry, codes=("OK", "UNAVAILABLE"), buckets=_BUCKETS)


@given(st.lists(st.sampled_from([0.0, 0.0005, 0.001, 0.0011, 0.01, 0.5, 1, 1.0001, 99]), max_size=30))
def test_histogram_equals_that_of_prometheus_client(seconds: list[float]) -> None:
    """Bucket by bucket, also for values on the bounds."""
    registry = CollectorRegistry()
    reference = CollectorRegistry()
    metrics = _metrics(registry)
    histogram = Histogram("cache_proxy_request_duration_seconds", "t", registry=reference, buckets=_BUCKETS)
    for one in seconds:
        metrics.count(code="OK", seconds=one, caller="c", outcomes={})
        histogram.observe(one)
    for suffix, labels in [
        *(("bucket", {"le": le}) for le in ("0.001", "0.01", "0.1", "1.0", "+Inf")),
        ("count", {}),
        ("sum", {}),
    ]:
        name = f"cache_proxy_request_duration_seconds_{suffix}"
        assert registry.get_sample_value(name, labels) == reference.get_sample_value(name, labels), labels


def test_outcomes_and_codes_exist_before_first_rpc() -> None:
    """A rate over a missing counter is "no data", not zero."""
    registry = CollectorRegistry()
    _metrics(registry)
    for outcome in ("l1", "l2", "stale", "coalesced", "inferred", "failed"):
        assert registry.get_sample_value("cache_proxy_pairs_total", {"outcome": outcome}) == 0
    assert registry.get_sample_value("cache_proxy_requests_total", {"code": "UNAVAILABLE"}) == 0


def test_callers_beyond_first_hundred_count_as_other() -> None:
    """Labels are bounded, and each pair is counted once, under its caller or under `other`."""
    registry = CollectorRegistry()
    metrics = _metrics(registry)
    for number in range(150):
        for _ in range(2):
            metrics.count(code="OK", seconds=0, caller=f"c{number}", outcomes={"l1": 2, "inferred": 1})
    counted = {
        (sample.labels["caller"], sample.labels["outcome"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "cache_proxy_caller_pairs_total"
    }
    assert len({caller for caller, _ in counted}) == 101
    assert counted["c99", "hit"] == 4
    # A share of a missing series would be "no data".
    assert counted["c99", "failed"] == 0
    assert (counted["other", "hit"], counted["other", "miss"]) == (50 * 4, 50 * 2)
    assert sum(counted.values()) == 150 * 2 * 3
