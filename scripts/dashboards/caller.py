"""The dashboard for teams that call the proxy: outcomes of their pairs, and the expected wait."""

from scripts.dashboards.expressions import (
    expected_wait,
    increase,
    max_over_replicas,
    quantiles,
    rate,
    select,
    share,
)
from scripts.dashboards.panels import BAD, GOOD, WARN, Dashboard, Query, Row, Series, Stat

_PAIRS = "cache_proxy_caller_pairs_total"
_CALLER = 'caller=~"$caller"'


def _outcome(outcome: str) -> str:
    return f'outcome="{outcome}"'


_HEADLINES = (
    Stat(
        title="Pairs",
        description="What the chosen callers asked for in the time shown.",
        queries=[Query(expr=increase(_PAIRS, _CALLER))],
        decimals=0,
    ),
    Stat(
        title="Hit rate",
        description="Share of these pairs that a cache answered, in milliseconds; the others waited for the "
        "model.",
        queries=[Query(expr=share(increase(_PAIRS, _CALLER, _outcome("hit")), increase(_PAIRS, _CALLER)))],
        unit="percentunit",
        steps=[(None, BAD), (0.5, WARN), (0.9, GOOD)],
        decimals=2,
    ),
    Stat(
        title="Failed",
        description="Share of these pairs that had no answer. The status of the RPC says why, and whether "
        "to come back.",
        queries=[Query(expr=share(increase(_PAIRS, _CALLER, _outcome("failed")), increase(_PAIRS, _CALLER)))],
        unit="percentunit",
        steps=[(None, GOOD), (0.001, WARN), (0.01, BAD)],
        decimals=2,
    ),
    Stat(
        title="Expected wait",
        description="For a new pair that comes now, by x-priority, besides the model's own time. Set "
        "deadlines that allow for it.",
        queries=[
            Query(expr=expected_wait("interactive"), legend="interactive"),
            Query(expr=expected_wait("interactive", "bulk"), legend="bulk"),
        ],
        unit="s",
        steps=[(None, GOOD), (60, WARN), (300, BAD)],
        decimals=1,
    ),
    Stat(
        title="Answered RPCs",
        description="Share of all callers' RPCs that ended with OK, in the time shown.",
        queries=[
            Query(
                expr=share(
                    increase("cache_proxy_requests_total", 'code="OK"'),
                    increase("cache_proxy_requests_total"),
                )
            )
        ],
        unit="percentunit",
        steps=[(None, BAD), (0.95, WARN), (0.99, GOOD)],
        decimals=2,
    ),
    Stat(
        title="Replicas",
        description="Replicas that answer. Known pairs are answered as long as there is one.",
        queries=[Query(expr=f"count({select('cache_proxy_build_info')})")],
        steps=[(None, BAD), (1, GOOD)],
    ),
)

_CALLER_PANELS = (
    Series(
        title="Our pairs",
        description="hit: a cache answered; miss: the model had to; failed: no answer.",
        queries=[Query(expr=rate(_PAIRS, _CALLER, by="outcome"), legend="{{outcome}}")],
        unit="cps",
        stacked=True,
    ),
    Series(
        title="Hit rate by caller",
        description="Share of the pairs that a cache answered.",
        queries=[
            Query(
                expr=f"{rate(_PAIRS, _CALLER, _outcome('hit'), by='caller')} / "
                f"({rate(_PAIRS, _CALLER, by='caller')} > 0)",
                legend="{{caller}}",
            )
        ],
        unit="percentunit",
        max=1,
    ),
    Series(
        title="Failed pairs by caller",
        description="Pairs without an answer. Those that the model refuses stay failed; the rest may be "
        "asked again.",
        queries=[Query(expr=rate(_PAIRS, _CALLER, _outcome("failed"), by="caller"), legend="{{caller}}")],
        unit="cps",
    ),
)

_ALL_CALLERS_PANELS = (
    Series(
        title="RPCs by status, all callers",
        description="RESOURCE_EXHAUSTED and UNAVAILABLE say by grpc-retry-pushback-ms when to come back.",
        queries=[Query(expr=f"{rate('cache_proxy_requests_total', by='code')} > 0", legend="{{code}}")],
        unit="reqps",
        stacked=True,
    ),
    Series(
        title="RPC duration, all callers",
        description="Known pairs take milliseconds; an RPC with a new pair waits for the model.",
        queries=quantiles("cache_proxy_request_duration_seconds"),
        unit="s",
    ),
    Series(
        title="Queue before the model",
        description="Pairs that wait for a call, by priority. interactive goes first; a tenth is kept for "
        "bulk.",
        queries=[
            Query(
                expr=max_over_replicas("cache_proxy_queue_global_pairs", by="priority"), legend="{{priority}}"
            )
        ],
        stacked=True,
    ),
)

DASHBOARD = Dashboard(
    title="Seniority cache: caller",
    description="What became of a caller's pairs (x-caller), and how long it would wait.",
    discovery_metric="cache_proxy_build_info",
    has_caller_variable=True,
    rows=[
        Row(title="Now", panels=_HEADLINES),
        Row(title="Our pairs", panels=_CALLER_PANELS),
        Row(title="All callers", panels=_ALL_CALLERS_PANELS),
    ],
)
