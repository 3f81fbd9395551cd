"""The limit on calls to the model: GCRA, the generic cell rate algorithm (ITU-T I.371).

State is one number, the theoretical arrival time `tat`: when the model will have worked off all that it
was sent. A cost is allowed as long as `tat` stays within the burst, so in any window of T seconds at most
`rate * T + burst` is spent.
"""

from dataclasses import dataclass

from services.cache_proxy.domain import PACE


@dataclass(slots=True)
class Gcra:
    """One limit. `rate_per_second` 0 means none; `burst` is in the same unit as a cost."""

    rate_per_second: float
    burst: float
    tat: float

    @classmethod
    def fully_spent(cls, *, rate_per_second: float, burst: float, now: float) -> "Gcra":
        """A limit that knows nothing of the past, so assumes the worst: all was just spent."""
        limit = cls(rate_per_second * PACE, burst, now)
        limit.tat = now + limit._seconds(burst)
        return limit

    def wait_seconds(self, cost: float, *, now: float) -> float:
        """How long until `cost` may be spent; 0 if now. A cost above the burst is taken as the burst."""
        return max(0.0, self.tat + self._seconds(min(cost, self.burst)) - self._seconds(self.burst) - now)

    def consume(self, cost: float, *, now: float) -> None:
        """Spend it; the caller has seen that it may."""
        self.tat = max(self.tat, now) + self._seconds(cost)

    def refund(self, cost: float) -> None:
        """Take back what was spent and not used; the caller knows that nobody spent since."""
        self.tat -= self._seconds(cost)

    def _seconds(self, cost: float) -> float:
        return cost / self.rate_per_second if self.rate_per_second else 0.0
