"""The dashboard for operators of the proxy: health, use of the model's limit, queue and callers.

It is one list of panels, which is easier to read in one piece; so the module is longer than usual.
"""

from scripts.dashboards.expressions import (
    expected_wait,
    increase,
    max_over_replicas,
    mean,
    quantiles,
    rate,
    select,
    share,
)
from scripts.dashboards.panels import BAD, GOOD, WARN, Dashboard, Query, Row, Series, Stat

_HITS = 'outcome=~"l1|l2|stale"'
_ANSWERED = 'outcome!="failed"'
_REJECTION_CODES = "INVALID_ARGUMENT|OUT_OF_RANGE|FAILED_PRECONDITION"
_BATCH = "cache_proxy_model_batch_pairs"
_QUEUE_PAIRS = "cache_proxy_queue_global_pairs"

_HEADLINES = (
    Stat(
        title="Hit rate",
        description="Share of the pairs that a cache answered, over the time shown. A new deployment begins "
        "at 0; once the past is cached, 99 % and more is usual.",
        queries=[
            Query(expr=share(increase("cache_proxy_pairs_total", _HITS), increase("cache_proxy_pairs_total")))
        ],
        unit="percentunit",
        steps=[(None, BAD), (0.5, WARN), (0.9, GOOD)],
        decimals=2,
    ),
    Stat(
        title="Model calls saved",
        description="Full calls that the answered pairs would have cost the model, less the pairs that it "
        "was sent: what caches and coalescing saved in the time shown.",
        queries=[
            Query(
                expr=f"({increase('cache_proxy_pairs_total', _ANSWERED)} - "
                f"{increase('cache_proxy_model_pairs_total')}) / "
                f"{max_over_replicas('cache_proxy_limit_batch_pairs')}"
            )
        ],
        decimals=1,
    ),
    Stat(
        title="Model calls",
        description="Calls to the model in the time shown, whatever came of them: each took a slot.",
        queries=[Query(expr=increase("cache_proxy_model_calls_total"))],
        decimals=0,
    ),
    Stat(
        title="Pairs to the model",
        description="Pairs in these calls. What was sent again after a failed call counts again.",
        queries=[Query(expr=increase("cache_proxy_model_pairs_total"))],
        decimals=0,
    ),
    Stat(
        title="Mean batch",
        description="Pairs in a call, on average over the time shown. Small ones are no loss while nobody "
        "waits.",
        queries=[Query(expr=mean(_BATCH))],
        decimals=1,
    ),
    Stat(
        title="Slot use",
        description="Share of the places in the model's calls that held a pair, over the time shown. Low "
        "with a queue that is not empty: batches close at their bytes, or the model refuses "
        "pairs.",
        queries=[Query(expr=f"{mean(_BATCH)} / {max_over_replicas('cache_proxy_limit_batch_pairs')}")],
        unit="percentunit",
        decimals=1,
    ),
    Stat(
        title="Calls a second, of the limit",
        description="Calls to the model against --model-calls-per-second, all replicas together. 100 % with "
        "a queue is as it should be; more than that is a limit passed. No data: there is no "
        "such limit.",
        queries=[
            Query(
                expr=share(
                    rate("cache_proxy_model_calls_total"),
                    max_over_replicas("cache_proxy_limit_calls_per_second"),
                )
            )
        ],
        unit="percentunit",
        steps=[(None, GOOD), (1.05, BAD)],
        decimals=1,
    ),
    Stat(
        title="Pairs a second, of the limit",
        description="Pairs to the model against the lesser of --model-rate and what its calls hold.",
        queries=[
            Query(
                expr=share(
                    rate("cache_proxy_model_pairs_total"),
                    max_over_replicas("cache_proxy_limit_pairs_per_second"),
                )
            )
        ],
        unit="percentunit",
        steps=[(None, GOOD), (1.05, BAD)],
        decimals=1,
    ),
    Stat(
        title="Queue",
        description="Pairs that wait for a call, by priority, all replicas together. refresh: stale "
        "answers, for which nobody waits.",
        queries=[Query(expr=max_over_replicas(_QUEUE_PAIRS, by="priority"), legend="{{priority}}")],
    ),
    Stat(
        title="Expected wait",
        description="Until what waits now has gone out, at the rate that the limit allows. For a pair that "
        "comes now, the model's own time comes on top.",
        queries=[
            Query(expr=expected_wait("interactive"), legend="interactive"),
            Query(expr=expected_wait("interactive", "bulk"), legend="bulk"),
        ],
        unit="s",
        steps=[(None, GOOD), (60, WARN), (300, BAD)],
        decimals=1,
    ),
    Stat(
        title="Degraded replicas",
        description="Replicas without their store or the shared queue. They answer, within their share of "
        "the limit, but pairs may be inferred more than once.",
        queries=[Query(expr=f"sum({select('cache_proxy_degraded')})")],
        steps=[(None, GOOD), (1, BAD)],
    ),
    Stat(
        title="Live replicas",
        description="Replicas that share the queue, as they see each other, and those that Prometheus sees.",
        queries=[
            Query(expr=max_over_replicas("cache_proxy_live_replicas"), legend="share the queue"),
            Query(expr=f"count({select('cache_proxy_build_info')})", legend="scraped"),
        ],
        steps=[(None, BAD), (1, GOOD)],
    ),
)

_CALLERS = (
    Series(
        title="Pairs by outcome",
        description="Each pair in one: l1, l2 and stale were answered by a cache, coalesced and inferred "
        "waited for the model, failed had no answer.",
        queries=[Query(expr=rate("cache_proxy_pairs_total", by="outcome"), legend="{{outcome}}")],
        unit="cps",
        stacked=True,
    ),
    Series(
        title="Hit rate over time",
        description="Share of the pairs that a cache answered.",
        queries=[
            Query(
                expr=share(rate("cache_proxy_pairs_total", _HITS), rate("cache_proxy_pairs_total")),
                legend="hit rate",
            )
        ],
        unit="percentunit",
        steps=[(None, BAD), (0.5, GOOD)],
        max=1,
    ),
    Series(
        title="RPCs by status",
        description="RESOURCE_EXHAUSTED: refused at once, the queue is full or the turn would come too late.",
        queries=[Query(expr=f"{rate('cache_proxy_requests_total', by='code')} > 0", legend="{{code}}")],
        unit="reqps",
        stacked=True,
    ),
    Series(
        title="RPC duration",
        description="All RPCs together: known pairs take milliseconds, new ones wait for the model.",
        queries=quantiles("cache_proxy_request_duration_seconds"),
        unit="s",
        steps=[(None, GOOD), (60, BAD)],
    ),
    Series(
        title="RPCs within 10 ms",
        description="Share of the RPCs that were answered within 10 ms: those that had no new pair.",
        queries=[
            Query(
                expr=share(
                    rate("cache_proxy_request_duration_seconds_bucket", 'le="0.01"'),
                    rate("cache_proxy_request_duration_seconds_count"),
                ),
                legend="within 10 ms",
            )
        ],
        unit="percentunit",
        max=1,
    ),
    Series(
        title="Pairs by caller",
        description="The ten who ask most. x-caller names them; the first hundred have names of their own.",
        queries=[
            Query(
                expr=f"topk(10, {rate('cache_proxy_caller_pairs_total', by='caller')})", legend="{{caller}}"
            )
        ],
        unit="cps",
    ),
    Series(
        title="Over their quotas",
        description="Requests refused because a caller had as much as its quota allows; pairs that wait only "
        "because quotas are spent.",
        queries=[
            Query(
                expr="sum by (caller, quota) "
                f"(increase({select('cache_proxy_quota_refused_total')}[$__rate_interval]))",
                legend="{{caller}}: {{quota}}",
            ),
            Query(expr=max_over_replicas("cache_proxy_quota_held_pairs"), legend="pairs held back"),
        ],
    ),
)

_MODEL = (
    Series(
        title="Calls a second",
        description="Calls to the model, all replicas together, and the limit.",
        queries=[
            Query(expr=rate("cache_proxy_model_calls_total"), legend="calls"),
            Query(expr=f"{max_over_replicas('cache_proxy_limit_calls_per_second')} > 0", legend="limit"),
        ],
        unit="cps",
    ),
    Series(
        title="Pairs a second",
        description="Pairs to the model, all replicas together, and the limit: the lesser of --model-rate "
        "and what its calls hold.",
        queries=[
            Query(expr=rate("cache_proxy_model_pairs_total"), legend="pairs"),
            Query(expr=max_over_replicas("cache_proxy_limit_pairs_per_second"), legend="limit"),
        ],
        unit="cps",
    ),
    Series(
        title="Pairs in a call",
        description="The mean, and the most that --model-batch-size allows.",
        queries=[
            Query(expr=share(rate(f"{_BATCH}_sum"), rate(f"{_BATCH}_count")), legend="mean"),
            Query(expr=max_over_replicas("cache_proxy_limit_batch_pairs"), legend="limit"),
        ],
    ),
    Series(
        title="Call duration",
        description="How long the model took. At --model-deadline (30 s) a call fails.",
        queries=quantiles("cache_proxy_model_duration_seconds"),
        unit="s",
        steps=[(None, GOOD), (30, BAD)],
    ),
    Series(
        title="Calls by status",
        description="INVALID_ARGUMENT, OUT_OF_RANGE and FAILED_PRECONDITION are refusals of pairs; the "
        "others but OK are failures, tried again with a backoff.",
        queries=[Query(expr=f"{rate('cache_proxy_model_calls_total', by='code')} > 0", legend="{{code}}")],
        unit="cps",
        stacked=True,
    ),
    Series(
        title="Failed calls",
        description="Share of the calls that failed; refusals of pairs are none.",
        queries=[
            Query(
                expr=share(
                    rate("cache_proxy_model_calls_total", f'code!~"OK|{_REJECTION_CODES}"'),
                    rate("cache_proxy_model_calls_total"),
                ),
                legend="failed",
            )
        ],
        unit="percentunit",
        steps=[(None, GOOD), (0.2, BAD)],
        max=1,
    ),
)

_QUEUE = (
    Series(
        title="Queue by priority",
        description="Pairs that wait for a call, all replicas together: each tells the same, so this is the "
        "max.",
        queries=[Query(expr=max_over_replicas(_QUEUE_PAIRS, by="priority"), legend="{{priority}}")],
        stacked=True,
    ),
    Series(
        title="Expected wait over time",
        description="Until what waits now has gone out, at the rate that the limit allows.",
        queries=[
            Query(expr=expected_wait("interactive"), legend="interactive"),
            Query(expr=expected_wait("interactive", "bulk"), legend="bulk"),
            Query(expr=expected_wait("interactive", "bulk", "refresh"), legend="refresh"),
        ],
        unit="s",
    ),
    Series(
        title="Oldest pair",
        description="How long the oldest pair has waited for which a caller waits.",
        queries=[Query(expr=max_over_replicas("cache_proxy_queue_oldest_seconds"), legend="oldest")],
        unit="s",
        steps=[(None, GOOD), (300, BAD)],
    ),
    Series(
        title="Wait for a call",
        description="How long pairs waited before they went to the model. Half a second on average at one "
        "call a second is the model's price; more is a queue.",
        queries=quantiles("cache_proxy_slot_wait_duration_seconds"),
        unit="s",
    ),
    Series(
        title="Queue by replica",
        description="Pairs that callers of each replica wait for; one that two replicas want counts in both.",
        queries=[
            Query(expr=f"sum by (instance) ({select('cache_proxy_queue_pairs')})", legend="{{instance}}")
        ],
    ),
    Series(
        title="Queue, of what it may hold",
        description="Pairs that wait against --max-queued-pairs. At 100 % callers are refused.",
        queries=[
            Query(
                expr=f"sum({max_over_replicas(_QUEUE_PAIRS, by='priority')}) / "
                f"{max_over_replicas('cache_proxy_limit_queued_pairs')}",
                legend="used",
            )
        ],
        unit="percentunit",
        steps=[(None, GOOD), (0.8, BAD)],
        max=1,
    ),
)

_STORE = (
    Series(
        title="Store, p99 by operation",
        description="get and put are the cache's scripts, the others the queue's. Ten milliseconds and more "
        "for get is Redis at its end.",
        queries=[
            Query(
                expr="histogram_quantile(0.99, "
                f"{rate('cache_proxy_store_duration_seconds_bucket', by='op, le')})",
                legend="{{op}}",
            )
        ],
        unit="s",
    ),
    Series(
        title="Store operations",
        description="Script calls a second; look-ups of RPCs that come together ride together.",
        queries=[Query(expr=rate("cache_proxy_store_duration_seconds_count", by="op"), legend="{{op}}")],
        unit="ops",
    ),
    Series(
        title="Degraded, evicting, garbage",
        description="Replicas without store or shared queue; replicas that see a Redis which may evict the "
        "queue; values in the store that were none; pairs whose node of a Cluster did not reply. All belong "
        "at 0.",
        queries=[
            Query(expr=f"sum({select('cache_proxy_degraded')})", legend="degraded replicas"),
            Query(expr=max_over_replicas("cache_proxy_store_evicts"), legend="Redis may evict"),
            Query(
                expr=f"sum(increase({select('cache_proxy_store_garbage_total')}[$__rate_interval]))",
                legend="garbage",
            ),
            Query(
                expr=f"sum(increase({select('cache_proxy_store_unread_pairs_total')}[$__rate_interval]))",
                legend="pairs of a node that does not reply",
            ),
        ],
    ),
    Series(
        title="Clock against Redis's",
        description="By how much a replica's clock is ahead of Redis's, as of its last look-up. More than a "
        "second means that one of the two is wrong. Answers age by Redis's clock.",
        queries=[Query(expr=select("cache_proxy_clock_difference_seconds"), legend="{{instance}}")],
        unit="s",
    ),
)

_REPLICAS = (
    Series(
        title="Replicas by version",
        description="Two versions for longer than a rollout takes: it is stuck.",
        queries=[
            Query(expr=f"count by (version) ({select('cache_proxy_build_info')})", legend="{{version}}"),
            Query(expr=max_over_replicas("cache_proxy_live_replicas"), legend="share the queue"),
        ],
    ),
    Series(
        title="L1",
        description="What the in-process cache takes. At --l1-max-bytes it forgets what is asked least.",
        queries=[Query(expr=select("cache_proxy_l1_bytes"), legend="{{instance}}")],
        unit="bytes",
    ),
    Series(
        title="L1 entries",
        description="Answers in it, by spelling.",
        queries=[Query(expr=select("cache_proxy_l1_entries"), legend="{{instance}}")],
    ),
    Series(
        title="Renewals",
        description="Certificates, tokens and lists of callers that were renewed, or could not be: then what "
        "they held before is used on, and the number of replicas where it is so belongs at 0.",
        queries=[
            Query(
                expr="sum by (files, outcome) "
                f"(increase({select('cache_proxy_renewals_total')}[$__rate_interval]))",
                legend="{{files}} {{outcome}}",
            ),
            Query(
                expr=f"sum by (files) ({select('cache_proxy_renewal_failing')})",
                legend="{{files}}: replicas that cannot use it",
            ),
        ],
    ),
    Series(
        title="CPU",
        description="Cores that each replica uses. A replica is one process on one core.",
        queries=[
            Query(
                expr=f"rate({select('process_cpu_seconds_total')}[$__rate_interval])", legend="{{instance}}"
            )
        ],
        unit="percentunit",
        steps=[(None, GOOD), (0.9, BAD)],
    ),
    Series(
        title="Memory",
        description="Resident memory of each replica: L1, and what waits.",
        queries=[Query(expr=select("process_resident_memory_bytes"), legend="{{instance}}")],
        unit="bytes",
    ),
)

DASHBOARD = Dashboard(
    title="Seniority cache: operator",
    description="The cache proxy and its use of the model, all replicas together.",
    discovery_metric="cache_proxy_build_info",
    rows=[
        Row(title="Now", panels=_HEADLINES),
        Row(title="Callers", panels=_CALLERS),
        Row(title="The model", panels=_MODEL),
        Row(title="The queue", panels=_QUEUE),
        Row(title="The store", panels=_STORE),
        Row(title="Replicas", panels=_REPLICAS),
    ],
)
