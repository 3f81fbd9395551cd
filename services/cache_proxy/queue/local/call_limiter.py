"""When the model may be called: pairs a second and calls a second, and not before a backoff ends."""

from typing import Protocol

from services.cache_proxy.queue.local.gcra import Gcra


class CallLimiter(Protocol):
    """When the model may be called. Times are on time.monotonic."""

    @property
    def slot_seconds(self) -> float:
        """How far apart full batches are; 0 if nothing limits them."""

    def wait_seconds(self, pairs: int, *, now: float) -> float:
        """How long until a call with so many pairs is allowed; 0 if now."""

    def consume(self, pairs: int, *, now: float) -> None:
        """Take the slot; the caller has seen that it may."""

    def refund(self, pairs: int) -> None:
        """Give the slot back; the caller knows that nobody took another since."""

    def postpone(self, seconds: float) -> bool:
        """The last call leaves so much later than it was spent; the caller knows that nobody spent since, and
        the last word counts. False if it must not.
        """  # noqa: D205 - one thought

    def block_until(self, not_before: float) -> None:
        """Allow no call before `moment`; the last word counts."""


class RateLimiter:
    """Two limits that hold together. State: their `tat`s and `_not_before`, all on the caller's clock, and by
    how much the last call moved the `tat`s on.
    """  # noqa: D205 - one thought

    def __init__(self, *, pairs_per_second: float, calls_per_second: float, burst: int, now: float) -> None:
        self._burst = burst
        self._pair_limit = Gcra.fully_spent(rate_per_second=pairs_per_second, burst=burst, now=now)
        self._call_limit = Gcra.fully_spent(rate_per_second=calls_per_second, burst=1, now=now)
        self._not_before = now
        self._postponed_seconds = 0.0

    @property
    def slot_seconds(self) -> float:
        """How far apart full batches are; 0 if nothing limits them."""
        per_pair, per_call = self._pair_limit.rate_per_second, self._call_limit.rate_per_second
        return max(self._burst / per_pair if per_pair else 0.0, 1 / per_call if per_call else 0.0)

    def wait_seconds(self, pairs: int, *, now: float) -> float:
        """How long until a call with so many pairs is allowed; 0 if now."""
        return max(
            0.0,
            self._not_before - now,
            self._pair_limit.wait_seconds(pairs, now=now),
            self._call_limit.wait_seconds(1, now=now),
        )

    def consume(self, pairs: int, *, now: float) -> None:
        """Take the slot; the caller has seen that it may."""
        self._pair_limit.consume(pairs, now=now)
        self._call_limit.consume(1, now=now)
        self._postponed_seconds = 0.0

    def refund(self, pairs: int) -> None:
        """Give the slot back; the caller knows that nobody took another since."""
        self._pair_limit.refund(pairs)
        self._call_limit.refund(1)
        self.postpone(0.0)

    def postpone(self, seconds: float) -> bool:
        """See `CallLimiter.delay`."""
        for limit in (self._pair_limit, self._call_limit):
            limit.tat += seconds - self._postponed_seconds
        self._postponed_seconds = seconds
        return True

    def block_until(self, not_before: float) -> None:
        """See `CallLimiter.hold_until`."""
        self._not_before = not_before
