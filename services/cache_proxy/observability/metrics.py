"""All metrics of the proxy. Dashboards and alerts rely on their names.

The first sentence of a help text defines the metric, the rest explains how to read it. `docs/metrics.md` is
generated from both.
"""

from importlib.metadata import version

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.cache_proxy.domain import PRIORITY_CLASSES
from services.cache_proxy.observability.rpc_metrics import RpcMetrics

RELOADABLE_FILES = (
    "listen_tls",
    "caller_tokens",
    "caller_quotas",
    "model_tls",
    "model_token",
    "cache_tls",
    "cache_password",
    "sentinel_password",
)

# All codes exist from the start, because a rate over a series that does not exist is "no data", not 0.
_GRPC_CODES = tuple(code.name for code in grpc.StatusCode)
_LATENCY_BUCKETS = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
    300,
)


class ProxyMetrics:
    """The metrics, registered in the given registry only, so that each test can have its own."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rpcs = RpcMetrics(registry, codes=_GRPC_CODES, buckets=_LATENCY_BUCKETS)
        self.model_calls = Counter(
            "cache_proxy_model_calls_total",
            "Calls to the model, by status. Each takes a slot, whatever its status; `INVALID_ARGUMENT`, "
            "`OUT_OF_RANGE` and `FAILED_PRECONDITION` are refusals of pairs, not failures.",
            ["code"],
            registry=registry,
        )
        self.model_pairs = Counter(
            "cache_proxy_model_pairs_total",
            "Pairs sent to the model. Those sent again after a failed call count again: over the "
            "`inferred` of `cache_proxy_pairs_total`, that is what failures and refreshing cost.",
            registry=registry,
        )
        self.model_batch_pairs = Histogram(
            "cache_proxy_model_batch_pairs",
            "Pairs in a call to the model. Below `cache_proxy_limit_batch_pairs` with a queue that is not "
            "empty, batches close at their bytes.",
            registry=registry,
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 750, 900, 950, 999, 1000),
        )
        self.model_duration = Histogram(
            "cache_proxy_model_duration_seconds",
            "How long a call to the model took. When it nears `--model-deadline`, calls begin to fail.",
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.queue_pairs = Gauge(
            "cache_proxy_queue_pairs",
            "Pairs of this replica that wait for the model. A pair for which several "
            "replicas wait counts in each.",
            ["priority"],
            registry=registry,
        )
        self.queue_global_pairs = Gauge(
            "cache_proxy_queue_global_pairs",
            "Pairs of all replicas that wait for a call to the model. Each replica tells the same: take the "
            "max, never the sum. One that lost Redis tells its own.",
            ["priority"],
            registry=registry,
        )
        self.queue_oldest_seconds = Gauge(
            "cache_proxy_queue_oldest_seconds",
            "How long the oldest pair has waited for which a caller waits. Of all replicas: take the max.",
            registry=registry,
        )
        self.quota_held_pairs = Gauge(
            "cache_proxy_quota_held_pairs",
            "Pairs of all replicas that wait only because their callers' quotas are spent. Each replica "
            "tells the same: take the max. They go out as the quotas allow, even where calls have room.",
            registry=registry,
        )
        self.slot_wait = Histogram(
            "cache_proxy_slot_wait_duration_seconds",
            "How long a pair waited for its call to the model. Half a second on average at one call a second "
            "is the model's price; more is a queue.",
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.store_duration = Histogram(
            "cache_proxy_store_duration_seconds",
            "How long an operation of the store took. `op` is the script: `get` and `put` are the cache's, "
            "the others the queue's. Ten milliseconds and more for `get` is Redis at its end.",
            ["op"],
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.store_up = Gauge(
            "cache_proxy_store_up",
            "1 if the store answered when it was last asked. An idle replica asks "
            "nothing: `cache_proxy_degraded` is sooner.",
            registry=registry,
        )
        self.clock_difference_seconds = Gauge(
            "cache_proxy_clock_difference_seconds",
            "By how much this process's clock is ahead of Redis's, as of the last look-up; negative if it is "
            "behind. Answers age by Redis's clock; more than a second means that a clock is wrong. 0 with "
            "`memory:`.",
            registry=registry,
        )
        self.degraded = Gauge(
            "cache_proxy_degraded",
            "1 while the proxy answers without its store or without the shared queue. It keeps to its share "
            "of the limit and comes back by itself; what it learns is written then.",
            registry=registry,
        )
        self.store_may_evict = Gauge(
            "cache_proxy_store_evicts",
            "1 if Redis may evict the queue and the limit. Set `maxmemory-policy` to `noeviction` or "
            "`volatile-lru`.",
            registry=registry,
        )
        self.live_replicas = Gauge(
            "cache_proxy_live_replicas",
            "Replicas that share the queue. Each tells the same: take the max. Less than run: some have lost "
            "Redis, and tell 1.",
            registry=registry,
        )
        self.store_garbage = Counter(
            "cache_proxy_store_garbage_total",
            "Values in the store that were none, taken as misses. Anything but 0: somebody else writes under "
            "`--key-prefix`.",
            registry=registry,
        )
        self.store_unread_pairs = Counter(
            "cache_proxy_store_unread_pairs_total",
            "Pairs whose node of a Redis Cluster did not reply to their look-up, taken as misses: they are "
            "inferred again. Anything but 0: a node is down, and its slots have no other.",
            registry=registry,
        )
        self.reloads = Counter(
            "cache_proxy_renewals_total",
            "Changes of certificates, tokens, the list of callers and their quotas that were noticed. "
            "`failed`: what is there now cannot be used, and what was there before is used on.",
            ["files", "outcome"],
            registry=registry,
        )
        self.reload_failing = Gauge(
            "cache_proxy_renewal_failing",
            "1 while what these files hold cannot be used. Nothing fails yet: what they held before is used, "
            "as long as it is valid, and a start would end in exit code 2.",
            ["files"],
            registry=registry,
        )
        self.l1_bytes = Gauge(
            "cache_proxy_l1_bytes",
            "What the in-process cache takes. At `--l1-max-bytes` it begins to forget what is asked least.",
            registry=registry,
        )
        self.l1_entries = Gauge(
            "cache_proxy_l1_entries",
            "Answers in the in-process cache. By spelling, not by pair.",
            registry=registry,
        )
        self.limit_calls_per_second = Gauge(
            "cache_proxy_limit_calls_per_second",
            "`--model-calls-per-second`: calls a second, of all replicas together. 0: no such limit.",
            registry=registry,
        )
        self.limit_pairs_per_second = Gauge(
            "cache_proxy_limit_pairs_per_second",
            "Pairs a second to the model, of all replicas together: the lesser of `--model-rate` and what "
            "its calls hold. Take the max.",
            registry=registry,
        )
        self.limit_batch_pairs = Gauge(
            "cache_proxy_limit_batch_pairs",
            "`--model-batch-size`: pairs in a call, at most. Take the max.",
            registry=registry,
        )
        self.limit_queued_pairs = Gauge(
            "cache_proxy_limit_queued_pairs",
            "`--max-queued-pairs`: pairs that may wait, of all replicas together. Who comes then is refused.",
            registry=registry,
        )
        build = Gauge(
            "cache_proxy_build_info",
            "Always 1. One series a replica: count them by `version`.",
            ["version"],
            registry=registry,
        )
        build.labels(version("seniority-cache")).set(1)
        for code in _GRPC_CODES:
            self.model_calls.labels(code)
        for files in RELOADABLE_FILES:
            self.reload_failing.labels(files)
            for outcome in ("done", "failed"):
                self.reloads.labels(files, outcome)
        for priority in PRIORITY_CLASSES:
            self.queue_pairs.labels(priority)
            self.queue_global_pairs.labels(priority)

    def set_limit_gauges(
        self, *, calls_per_second: float, pairs_per_second: float, batch_pairs: int, queued_pairs: int
    ) -> None:
        """Set the gauges of the configured limits."""
        pairs_by_calls = calls_per_second * batch_pairs
        self.limit_calls_per_second.set(calls_per_second)
        self.limit_pairs_per_second.set(
            min(pairs_per_second, pairs_by_calls) if pairs_by_calls else pairs_per_second
        )
        self.limit_batch_pairs.set(batch_pairs)
        self.limit_queued_pairs.set(queued_pairs)
