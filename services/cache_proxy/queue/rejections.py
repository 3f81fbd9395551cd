"""Why a request is not queued, in the words that its caller gets; one for both queues."""

import math

from services.cache_proxy.errors import OverQuota, QueueFull
from services.cache_proxy.queue.quotas import OTHERS, Quota

_PUSHBACK_SECONDS = (1.0, 60.0)


def pushback_seconds(wait_seconds: float) -> float:
    """How long a caller that was not queued should stay away."""
    least, most = _PUSHBACK_SECONDS
    return min(most, max(least, wait_seconds))


def full(held: int, unit: str, *, most: int, wait_seconds: float) -> QueueFull:
    """The queue holds as much as it may."""
    return QueueFull(
        f"the queue is full: {held} {unit} wait, the limit is {most}", pushback_seconds(wait_seconds)
    )


def late(*, wait_seconds: float, left_seconds: float) -> QueueFull:
    """The turn would come after the caller's deadline."""
    left = f"the deadline is in {max(0.0, left_seconds):.1f} s"
    if math.isinf(wait_seconds):
        return QueueFull(f"no call to the model is due, and {left}", pushback_seconds(wait_seconds))
    reason = f"the pairs would wait {wait_seconds:.1f} s for the model, but {left}"
    return QueueFull(reason, pushback_seconds(wait_seconds - left_seconds))


def over_queued_pairs(quota: Quota, *, waiting: int, pairs: int, wait_seconds: float) -> OverQuota:
    """The caller's pairs that wait are as many as may, or would be."""
    reason = (
        f"quota queued_pairs of {_whose(quota)}: {waiting} pairs wait and {pairs} more would, "
        f"the limit is {quota.queued_pairs}"
    )
    return OverQuota(reason, pushback_seconds(wait_seconds), quota.account, "queued_pairs")


def over_pairs_per_second(quota: Quota, *, wait_seconds: float, left_seconds: float) -> OverQuota:
    """The quota lets the pairs go only after the caller's deadline."""
    reason = (
        f"quota pairs_per_second of {_whose(quota)}: at {quota.pairs_per_second:g} pairs a second they would "
        f"wait {wait_seconds:.1f} s, but the deadline is in {max(0.0, left_seconds):.1f} s"
    )
    retry_after_seconds = pushback_seconds(wait_seconds - left_seconds)
    return OverQuota(reason, retry_after_seconds, quota.account, "pairs_per_second")


def _whose(quota: Quota) -> str:
    return "all callers without one of their own" if quota.account == OTHERS else f"caller {quota.account!r}"
