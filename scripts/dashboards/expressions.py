"""PromQL expressions that several panels use."""

from scripts.dashboards.panels import SCOPE, Query

RATE = "$__rate_interval"
RANGE = "$__range"


def select(name: str, *matchers: str) -> str:
    """Return a selector for a metric of the selected deployments."""
    return f"{name}{{{','.join((SCOPE, *matchers))}}}"


def rate(name: str, *matchers: str, by: str = "") -> str:
    """Return the per-second increase of a counter."""
    return f"{_sum(by)}(rate({select(name, *matchers)}[{RATE}]))"


def increase(name: str, *matchers: str, by: str = "") -> str:
    """Return the increase of a counter over the displayed time range."""
    return f"{_sum(by)}(increase({select(name, *matchers)}[{RANGE}]))"


def max_over_replicas(name: str, *matchers: str, by: str = "") -> str:
    """Return the maximum over all replicas, of a value that each of them reports for the fleet."""
    return f"max{f' by ({by}) ' if by else ''}({select(name, *matchers)})"


def share(part: str, whole: str) -> str:
    """Return `part / whole`, which is no data while `whole` is 0."""
    return f"{part} / ({whole} > 0)"


def quantiles(name: str, *matchers: str) -> list[Query]:
    """Return the queries of p50, p95 and p99 of a histogram."""
    buckets = rate(f"{name}_bucket", *matchers, by="le")
    return [
        Query(expr=f"histogram_quantile({quantile}, {buckets})", legend=f"p{quantile * 100:.0f}")
        for quantile in (0.5, 0.95, 0.99)
    ]


def mean(name: str) -> str:
    """Return the mean of a histogram over the displayed time range."""
    return share(increase(f"{name}_sum"), increase(f"{name}_count"))


def expected_wait(*priorities: str) -> str:
    """Return the time until the last waiting pair of these priorities is sent, at the rate limit."""
    # A tenth of every call is reserved for bulk.
    if priorities == ("interactive",):
        queued = f"{max_over_replicas('cache_proxy_queue_global_pairs', _priority(priorities))} / 0.9"
    else:
        by_priority = max_over_replicas(
            "cache_proxy_queue_global_pairs", _priority(priorities), by="priority"
        )
        queued = f"sum({by_priority})"
    return f"{queued} / {max_over_replicas('cache_proxy_limit_pairs_per_second')}"


def _priority(priorities: tuple[str, ...]) -> str:
    return f'priority=~"{"|".join(priorities)}"'


def _sum(by: str) -> str:
    return f"sum by ({by}) " if by else "sum"
