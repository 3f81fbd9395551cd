"""Why a request is not queued, in the words that its caller gets; one for both queues."""

import math

from services.cache_proxy.errors import QueueFullError, QuotaExceededError
from services.cache_proxy.queue.quotas import DEFAULT_ACCOUNT, Quota

_PUSHBACK_RANGE_SECONDS = (1.0, 60.0)


def pushback_seconds(wait_seconds: float) -> float:
    """How long a caller that was not queued should stay away."""
    least, most = _PUSHBACK_RANGE_SECONDS
    return min(most, max(least, wait_seconds))


def queue_full_error(held: int, unit: str, *, max_held: int, wait_seconds: float) -> QueueFullError:
    """The queue holds as much as it may."""
    return QueueFullError(
        f"the queue is full: {held} {unit} wait, the limit is {max_held}", pushback_seconds(wait_seconds)
    )


def deadline_error(*, wait_seconds: float, left_seconds: float) -> QueueFullError:
    """The turn would come after the caller's deadline."""
    left = f"the deadline is in {max(0.0, left_seconds):.1f} s"
    if math.isinf(wait_seconds):
        return QueueFullError(f"no call to the model is due, and {left}", pushback_seconds(wait_seconds))
    reason = f"the pairs would wait {wait_seconds:.1f} s for the model, but {left}"
    return QueueFullError(reason, pushback_seconds(wait_seconds - left_seconds))


def queued_pairs_quota_error(
    quota: Quota, *, waiting: int, pairs: int, wait_seconds: float
) -> QuotaExceededError:
    """The caller's pairs that wait are as many as may, or would be."""
    reason = (
        f"quota queued_pairs of {_describe_quota_owner(quota)}: {waiting} pairs wait and {pairs} more would, "
        f"the limit is {quota.queued_pairs}"
    )
    return QuotaExceededError(reason, pushback_seconds(wait_seconds), quota.account, "queued_pairs")


def pairs_rate_quota_error(quota: Quota, *, wait_seconds: float, left_seconds: float) -> QuotaExceededError:
    """The quota lets the pairs go only after the caller's deadline."""
    reason = (
        f"quota pairs_per_second of {_describe_quota_owner(quota)}: "
        f"at {quota.pairs_per_second:g} pairs a second they would wait {wait_seconds:.1f} s, "
        f"but the deadline is in {max(0.0, left_seconds):.1f} s"
    )
    retry_after_seconds = pushback_seconds(wait_seconds - left_seconds)
    return QuotaExceededError(reason, retry_after_seconds, quota.account, "pairs_per_second")


def _describe_quota_owner(quota: Quota) -> str:
    return (
        "all callers without one of their own"
        if quota.account == DEFAULT_ACCOUNT
        else f"caller {quota.account!r}"
    )
