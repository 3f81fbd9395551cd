"""The rate limits on calls to the model: pairs per second, calls per second, and backoff."""

from typing import Protocol

from services.cache_proxy.queue.local.gcra import Gcra
from services.common.compat import override


class CallLimiter(Protocol):
    """Decides when the model may be called. Times are on `time.monotonic`."""

    @property
    def slot_seconds(self) -> float:
        """Return the time between two full batches. 0 means no limit."""

    def wait_seconds(self, pairs: int, *, now: float) -> float:
        """Return the time until a call with that many pairs is allowed, 0 if it is allowed now."""

    def consume(self, pairs: int, *, now: float) -> None:
        """Consume the slot of a call. The caller must have checked that it is allowed."""

    def refund(self, pairs: int) -> None:
        """Return the slot of the last call. The caller must know that nothing was consumed since."""

    def postpone(self, seconds: float) -> bool:
        """Move the slot of the last call by some seconds. Return False if that is not allowed.

        The caller must know that nothing was consumed since. A second call replaces the first.
        """

    def block_until(self, not_before: float) -> None:
        """Allow no call before a moment. A second call replaces the first."""


class RateLimiter(CallLimiter):
    """Two limits that hold together, on pairs and on calls.

    State:

    - `_pair_limit` and `_call_limit`: the two limits.
    - `_not_before`: the end of a backoff.
    - `_postponed_seconds`: by how much the last call was postponed.

    All times are on the caller's clock.
    """

    def __init__(self, *, pairs_per_second: float, calls_per_second: float, burst: int, now: float) -> None:
        self._burst = burst
        self._pair_limit = Gcra.fully_spent(rate_per_second=pairs_per_second, burst=burst, now=now)
        self._call_limit = Gcra.fully_spent(rate_per_second=calls_per_second, burst=1, now=now)
        self._not_before = now
        self._postponed_seconds = 0.0

    @property
    @override
    def slot_seconds(self) -> float:
        per_pair, per_call = self._pair_limit.rate_per_second, self._call_limit.rate_per_second
        return max(self._burst / per_pair if per_pair else 0.0, 1 / per_call if per_call else 0.0)

    @override
    def wait_seconds(self, pairs: int, *, now: float) -> float:
        return max(
            0.0,
            self._not_before - now,
            self._pair_limit.wait_seconds(pairs, now=now),
            self._call_limit.wait_seconds(1, now=now),
        )

    @override
    def consume(self, pairs: int, *, now: float) -> None:
        self._pair_limit.consume(pairs, now=now)
        self._call_limit.consume(1, now=now)
        self._postponed_seconds = 0.0

    @override
    def refund(self, pairs: int) -> None:
        self._pair_limit.refund(pairs)
        self._call_limit.refund(1)
        self.postpone(0.0)

    @override
    def postpone(self, seconds: float) -> bool:
        for limit in (self._pair_limit, self._call_limit):
            limit.tat += seconds - self._postponed_seconds
        self._postponed_seconds = seconds
        return True

    @override
    def block_until(self, not_before: float) -> None:
        self._not_before = not_before
