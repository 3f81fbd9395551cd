"""How long this replica leaves calls to the model to the others after its own calls failed."""

import time

from services.cache_proxy.domain import PACE
from services.cache_proxy.errors import ModelUnavailableError
from services.cache_proxy.queue.interface import Claim, QueueLimits
from services.cache_proxy.queue.outage import Outage

# A replica whose own calls fail while those of others are answered leaves the others the next calls, for this
# long after its first failure and after the ones that follow.
_FIRST_DEFERRAL_SECONDS = 30.0
_MAX_DEFERRAL_SECONDS = 60.0

# So much longer than its backoff a replica claims nothing after a failed call: another one, which may reach
# the model, has the next slot.
_CLAIM_DELAY_AFTER_FAILURE_SECONDS = 0.2


class CallDeferral:
    """Consecutive failed calls of one replica, beside those that Redis counts for all replicas.

    State, touched only from the event loop: `_outage`, and `not_before`, the time on time.monotonic before
    which the replica claims nothing.
    """

    def __init__(self, limits: QueueLimits) -> None:
        self._calls_per_second = limits.calls_per_second * PACE
        self._outage = Outage(window_seconds=limits.retry_window_seconds)
        self.not_before = 0.0

    def record_failure(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None,
        model_fault: bool,
        unsent: bool,
        jitter: float,
    ) -> None:
        """Record a failed call. The arguments are those of `Queue.fail`; `jitter` scales the backoff."""
        self._outage.record_failure(
            error,
            sent_at=claim.send_at,
            now=time.monotonic(),
            pushback_seconds=retry_after_seconds,
            model_fault=model_fault,
            jitter=jitter,
        )
        retry_at = self._outage.not_before
        # The limit allows no call before its next slot, so another replica can only take a slot after that.
        if self._outage.defers_to_others and self._calls_per_second and not unsent:
            retry_at = max(retry_at, claim.slot_at + 1 / self._calls_per_second)
        self.not_before = retry_at + _CLAIM_DELAY_AFTER_FAILURE_SECONDS

    def reset(self) -> None:
        """Record that the model answered a call of this replica."""
        self._outage.reset()

    def failure_age_ms(self, now: float) -> int:
        """Return how long ago a call failed that may fail for this replica alone.

        -1 if the last call did not, or so long ago that the replica tries again like any other.
        """
        if not self._outage.defers_to_others:
            return -1
        max_age_seconds = _MAX_DEFERRAL_SECONDS if self._outage.failures > 1 else _FIRST_DEFERRAL_SECONDS
        age_seconds = now - self._outage.failed_at
        return round(age_seconds * 1000) if age_seconds < max_age_seconds else -1
