"""The errors of requests that are not queued, with the texts that callers read, for both queues."""

import math
from typing import Any

from services.cache_proxy.errors import ModelUnavailableError, PairError, QueueFullError, QuotaExceededError
from services.cache_proxy.queue.interface import QueueLimits
from services.cache_proxy.queue.quotas import DEFAULT_ACCOUNT, Quota

_PUSHBACK_RANGE_SECONDS = (1.0, 60.0)
_MIN_MODEL_PUSHBACK_SECONDS = 1.0


def pushback_seconds(wait_seconds: float) -> float:
    """Return how long a rejected caller should wait before it retries: the expected wait, 1 to 60 s."""
    min_seconds, max_seconds = _PUSHBACK_RANGE_SECONDS
    return min(max_seconds, max(min_seconds, wait_seconds))


def queue_full_error(held: int, unit: str, *, max_held: int, wait_seconds: float) -> QueueFullError:
    """Return the error for a queue that holds its maximum of `unit` (pairs or bytes)."""
    return QueueFullError(
        f"the queue is full: {held} {unit} wait, the limit is {max_held}", pushback_seconds(wait_seconds)
    )


def deadline_error(*, wait_seconds: float, left_seconds: float) -> QueueFullError:
    """Return the error for a request whose call to the model would come after its deadline."""
    left = f"the deadline is in {max(0.0, left_seconds):.1f} s"
    if math.isinf(wait_seconds):
        return QueueFullError(f"no call to the model is due, and {left}", pushback_seconds(wait_seconds))
    reason = f"the pairs would wait {wait_seconds:.1f} s for the model, but {left}"
    return QueueFullError(reason, pushback_seconds(wait_seconds - left_seconds))


def queued_pairs_quota_error(
    quota: Quota, *, waiting: int, pairs: int, wait_seconds: float
) -> QuotaExceededError:
    """Return the error for a caller that would have more pairs in the queue than its quota allows."""
    reason = (
        f"quota queued_pairs of {_describe_quota_owner(quota)}: {waiting} pairs wait and {pairs} more would, "
        f"the limit is {quota.queued_pairs}"
    )
    return QuotaExceededError(reason, pushback_seconds(wait_seconds), quota.account, "queued_pairs")


def pairs_rate_quota_error(quota: Quota, *, wait_seconds: float, left_seconds: float) -> QuotaExceededError:
    """Return the error for a request whose pairs the caller's rate quota delays beyond its deadline."""
    reason = (
        f"quota pairs_per_second of {_describe_quota_owner(quota)}: at {quota.pairs_per_second:g} pairs a "
        f"second they would wait {wait_seconds:.1f} s, but the deadline is in {max(0.0, left_seconds):.1f} s"
    )
    retry_after_seconds = pushback_seconds(wait_seconds - left_seconds)
    return QuotaExceededError(reason, retry_after_seconds, quota.account, "pairs_per_second")


def model_down_error(reason: PairError | None, *, wait_seconds: float) -> ModelUnavailableError:
    """Return the error for a request while the model is down: the one of the last call, if it is known."""
    error = reason
    if not isinstance(error, ModelUnavailableError):
        error = ModelUnavailableError("the model is down", 0.0)
    error.retry_after_seconds = max(_MIN_MODEL_PUSHBACK_SECONDS, wait_seconds)
    return error


def decode_rejection(
    reply: Any, quota: Quota | None, *, limits: QueueLimits, pairs: int, timeout_seconds: float
) -> QueueFullError:
    """Return the error for a request that `enqueue.lua` did not admit.

    `reply` has the reason, the expected wait in ms, and what the reason's text needs.
    """
    reason = reply[0]
    wait_seconds = reply[1] / 1000
    if reason == b"full":
        held, unit = reply[2].decode().split(" ")
        max_held = limits.max_pairs if unit == "pairs" else limits.max_bytes
        return queue_full_error(int(held), unit, max_held=max_held, wait_seconds=wait_seconds)
    if reason == b"queued" and quota is not None:
        return queued_pairs_quota_error(quota, waiting=int(reply[2]), pairs=pairs, wait_seconds=wait_seconds)
    if reason == b"slow" and quota is not None:
        return pairs_rate_quota_error(quota, wait_seconds=wait_seconds, left_seconds=timeout_seconds)
    return deadline_error(wait_seconds=wait_seconds, left_seconds=timeout_seconds)


def _describe_quota_owner(quota: Quota) -> str:
    if quota.account == DEFAULT_ACCOUNT:
        return "all callers without one of their own"
    return f"caller {quota.account!r}"
