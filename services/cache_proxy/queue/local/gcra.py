"""A rate limit: the generic cell rate algorithm, GCRA (ITU-T I.371).

The state is one number, the theoretical arrival time `tat`: when all that was consumed will have been earned
again at the limit's rate. A cost is allowed as long as `tat` stays within the burst, so in any window of T
seconds at most `rate * T + burst` is consumed.
"""

from dataclasses import dataclass

from services.cache_proxy.domain import PACE


@dataclass(slots=True)
class Gcra:
    """One rate limit. A `rate_per_second` of 0 means no limit. `burst` has the unit of a cost."""

    rate_per_second: float
    burst: float
    tat: float

    @classmethod
    def fully_spent(cls, *, rate_per_second: float, burst: float, now: float) -> "Gcra":
        """Return a limit whose burst has just been consumed: the worst case, since the past is unknown."""
        limit = cls(rate_per_second * PACE, burst, now)
        limit.tat = now + limit._seconds(burst)
        return limit

    def wait_seconds(self, cost: float, *, now: float) -> float:
        """Return the time until a cost may be consumed, 0 if now.

        A cost above the burst counts as the burst.
        """
        return max(0.0, self.tat + self._seconds(min(cost, self.burst)) - self._seconds(self.burst) - now)

    def consume(self, cost: float, *, now: float) -> None:
        """Consume a cost. The caller must have checked that it is allowed."""
        self.tat = max(self.tat, now) + self._seconds(cost)

    def refund(self, cost: float) -> None:
        """Return a cost that was not used. The caller must know that nothing was consumed since."""
        self.tat -= self._seconds(cost)

    def _seconds(self, cost: float) -> float:
        return cost / self.rate_per_second if self.rate_per_second else 0.0
