"""PromQL that several panels need."""

from scripts.dashboards.panels import SCOPE, Query

RATE = "$__rate_interval"
RANGE = "$__range"


def select(name: str, *matchers: str) -> str:
    """A metric of the chosen deployments."""
    return f"{name}{{{','.join((SCOPE, *matchers))}}}"


def rate(name: str, *matchers: str, by: str = "") -> str:
    """What a counter gains a second."""
    return f"{_sum(by)}(rate({select(name, *matchers)}[{RATE}]))"


def increase(name: str, *matchers: str, by: str = "") -> str:
    """What a counter gained in the time shown."""
    return f"{_sum(by)}(increase({select(name, *matchers)}[{RANGE}]))"


def max_over_replicas(name: str, *matchers: str, by: str = "") -> str:
    """What all replicas tell alike."""
    return f"max{f' by ({by}) ' if by else ''}({select(name, *matchers)})"


def share(part: str, whole: str) -> str:
    """No data, rather than a division by zero, while there is nothing to have a share of."""
    return f"{part} / ({whole} > 0)"


def quantiles(name: str, *matchers: str) -> list[Query]:
    """Of a histogram: what half, most and nearly all stay below."""
    buckets = rate(f"{name}_bucket", *matchers, by="le")
    return [
        Query(expr=f"histogram_quantile({quantile}, {buckets})", legend=f"p{quantile * 100:.0f}")
        for quantile in (0.5, 0.95, 0.99)
    ]


def mean(name: str) -> str:
    """A histogram's mean over the time shown."""
    return share(increase(f"{name}_sum"), increase(f"{name}_count"))


def expected_wait(*priorities: str) -> str:
    """Until the last pair of these priorities that waits now goes out, at the rate that the limit allows."""
    if priorities == ("interactive",):  # a tenth of every call is kept for bulk
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
