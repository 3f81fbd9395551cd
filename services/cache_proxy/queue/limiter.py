"""When the model may be called: pairs a second and calls a second, and not before a backoff ends."""

from typing import Protocol

from services.cache_proxy.queue.gcra import Gcra


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

    def delay(self, seconds: float) -> None:
        """The last call was so much later than it was spent; the caller knows that nobody spent since."""

    def hold_until(self, moment: float) -> None:
        """Allow no call before `moment`."""


class Limiter:
    """Two limits that hold together. State: their `tat`s and `_not_before`, all on the caller's clock."""

    def __init__(self, *, pairs_per_second: float, calls_per_second: float, burst: int, now: float) -> None:
        self._burst = burst
        self._pairs = Gcra.begin(rate_per_second=pairs_per_second, burst=burst, now=now)
        self._calls = Gcra.begin(rate_per_second=calls_per_second, burst=1, now=now)
        self._not_before = now

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

    def refund(self, pairs: int) -> None:
        """Give the slot back; the caller knows that nobody took another since."""
        self._pairs.refund(pairs)
        self._calls.refund(1)

    def delay(self, seconds: float) -> None:
        """The last call was so much later than it was spent; the caller knows that nobody spent since."""
        self._pairs.tat += seconds
        self._calls.tat += seconds

    def hold_until(self, moment: float) -> None:
        """Allow no call before `moment`."""
        self._not_before = max(self._not_before, moment)
