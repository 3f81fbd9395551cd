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

    def spend(self, pairs: int, *, now: float) -> None:
        """Take the slot; the caller has seen that it may."""

    def refund(self, pairs: int) -> None:
        """Give the slot back; the caller knows that nobody took another since."""

    def delay(self, seconds: float) -> bool:
        """The last call leaves so much later than it was spent; the caller knows that nobody spent since, and
        the last word counts. False if it must not.
        """  # noqa: D205 - one thought

    def hold_until(self, moment: float) -> None:
        """Allow no call before `moment`; the last word counts."""


class Limiter:
    """Two limits that hold together. State: their `tat`s and `_not_before`, all on the caller's clock, and by
    how much the last call moved the `tat`s on.
    """  # noqa: D205 - one thought

    def __init__(self, *, pairs_per_second: float, calls_per_second: float, burst: int, now: float) -> None:
        self._burst = burst
        self._pairs = Gcra.begin(rate_per_second=pairs_per_second, burst=burst, now=now)
        self._calls = Gcra.begin(rate_per_second=calls_per_second, burst=1, now=now)
        self._not_before = now
        self._delayed_seconds = 0.0

    @property
    def slot_seconds(self) -> float:
        """How far apart full batches are; 0 if nothing limits them."""
        per_pair, per_call = self._pairs.rate_per_second, self._calls.rate_per_second
        return max(self._burst / per_pair if per_pair else 0.0, 1 / per_call if per_call else 0.0)

    def wait_seconds(self, pairs: int, *, now: float) -> float:
        """How long until a call with so many pairs is allowed; 0 if now."""
        return max(
            0.0,
            self._not_before - now,
            self._pairs.wait_seconds(pairs, now=now),
            self._calls.wait_seconds(1, now=now),
        )

    def spend(self, pairs: int, *, now: float) -> None:
        """Take the slot; the caller has seen that it may."""
        self._pairs.spend(pairs, now=now)
        self._calls.spend(1, now=now)
        self._delayed_seconds = 0.0

    def refund(self, pairs: int) -> None:
        """Give the slot back; the caller knows that nobody took another since."""
        self._pairs.refund(pairs)
        self._calls.refund(1)
        self.delay(0.0)

    def delay(self, seconds: float) -> bool:
        """See `CallLimiter.delay`."""
        for limit in (self._pairs, self._calls):
            limit.tat += seconds - self._delayed_seconds
        self._delayed_seconds = seconds
        return True

    def hold_until(self, moment: float) -> None:
        """See `CallLimiter.hold_until`."""
        self._not_before = moment
