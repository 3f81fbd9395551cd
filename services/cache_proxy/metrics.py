"""Every metric of the proxy, by the names that dashboards rely on."""

from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.cache_proxy.rpc_metrics import RpcMetrics

PRIORITIES = ("interactive", "bulk")  # what a caller may ask for
LANES = (*PRIORITIES, "refresh")  # and below both, what nobody waits for

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ProxyMetrics:
    """Registers in `registry` and nowhere else, so that a test may have its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rpcs = RpcMetrics(registry, buckets=_FAST)
        self.model_calls = Counter(
            "cache_proxy_model_calls_total", "Calls to the model, by status.", ["code"], registry=registry
        )
        self.model_pairs = Counter(
            "cache_proxy_model_pairs_total", "Pairs sent to the model.", registry=registry
        )
        self.model_batch_pairs = Histogram(
            "cache_proxy_model_batch_pairs", "Pairs in a call to the model.", registry=registry,
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 750, 900, 950, 999, 1000),
        )  # fmt: skip
        self.model_duration = Histogram(
            "cache_proxy_model_duration_seconds", "How long a call to the model took.",
            registry=registry, buckets=_FAST,
        )  # fmt: skip
        self.queue_pairs = Gauge(
            "cache_proxy_queue_pairs", "Pairs of this replica that wait for the model.",
            ["priority"], registry=registry,
        )  # fmt: skip
        self.queue_global_pairs = Gauge(
            "cache_proxy_queue_global_pairs", "Pairs of all replicas that wait for the model (take the max).",
            ["priority"], registry=registry,
        )  # fmt: skip
        self.queue_oldest = Gauge(
            "cache_proxy_queue_oldest_seconds", "How long the oldest of them has waited.", registry=registry
        )
        self.slot_wait = Histogram(
            "cache_proxy_slot_wait_duration_seconds", "How long a pair waited for its call to the model.",
            registry=registry, buckets=_FAST,
        )  # fmt: skip
        self.store_duration = Histogram(
            "cache_proxy_store_duration_seconds", "How long an operation of the store took.",
            ["op"], registry=registry, buckets=_FAST,
        )  # fmt: skip
        self.store_up = Gauge("cache_proxy_store_up", "1 if the store answers.", registry=registry)
        self.degraded = Gauge(
            "cache_proxy_degraded", "1 while the proxy answers without its store.", registry=registry
        )
        self.store_evicts = Gauge(
            "cache_proxy_store_evicts", "1 if Redis may evict the queue and the limit.", registry=registry
        )
        self.live_replicas = Gauge(
            "cache_proxy_live_replicas", "Replicas that share the queue.", registry=registry
        )
        self.store_garbage = Counter(
            "cache_proxy_store_garbage_total", "Values in the store that were none, taken as misses.",
            registry=registry,
        )  # fmt: skip
        self.l1_bytes = Gauge("cache_proxy_l1_bytes", "What the in-process cache takes.", registry=registry)
        self.l1_entries = Gauge("cache_proxy_l1_entries", "Answers in it.", registry=registry)
        build = Gauge("cache_proxy_build_info", "Always 1.", ["version"], registry=registry)
        build.labels(version("seniority-cache")).set(1)
        for priority in LANES:
            self.queue_pairs.labels(priority)
            self.queue_global_pairs.labels(priority)
