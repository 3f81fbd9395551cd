"""The quotas in pairs per second: a GCRA for each account, as in `queue/lua/include/quotas.lua`.

A quota is a ceiling, whether or not the model has capacity left. It is charged when a pair is sent for the
first time, and not again when the pair is retried. Unused quota is kept for one and a half slots of the rate
limit, at least for a second, so that a call which is a little late costs no caller anything.
"""

import math
from collections.abc import Callable, Mapping

from services.cache_proxy.domain import PACE
from services.cache_proxy.queue.quotas import Quota

_MIN_BURST_SECONDS = 1.0
_BURST_SLOTS = 1.5
_ROUNDING_TOLERANCE = 1e-6

QuotaConsumption = Mapping[str, tuple[float, float]]
"""By account: the theoretical arrival time before and after the consumption."""


class QuotaLimiter:
    """Limits the pairs per second of accounts.

    State:

    - `_tat`: the theoretical arrival time of each account whose quota is partly used.
    - `_history_start`: the time before which consumption is unknown. All quotas may have been used up just
      then.

    `replicas` returns how many replicas share the quotas. Each has an equal part.
    """

    def __init__(self, *, slot_seconds: float, replicas: Callable[[], int], now: float) -> None:
        self._slot_seconds = slot_seconds
        self._replicas = replicas
        self._history_start = now
        self._tat: dict[str, float] = {}

    def reset(self, *, now: float) -> None:
        """Assume that all quotas are used up: another queue consumed from them until now."""
        self._history_start = now
        self._tat.clear()

    def max_queued_pairs(self, quota: Quota) -> int:
        """Return how many pairs of an account may wait in this process. 0 means no limit."""
        return quota.queued_pairs and max(1, quota.queued_pairs // self._replicas())

    def available(self, quota: Quota, *, now: float) -> float:
        """Return how many pairs an account may send now, `inf` without such a quota."""
        rate = self._rate(quota)
        if not rate:
            return math.inf
        saved_seconds = now + self._burst_seconds(rate) - max(self._tat_for(quota, rate), now)
        return max(0, math.floor(saved_seconds * rate + _ROUNDING_TOLERANCE))

    def wait_seconds(self, quota: Quota, count: int, *, now: float) -> float:
        """Return the time until an account may have sent `count` more pairs."""
        rate = self._rate(quota)
        if not rate:
            return 0.0
        return max(0.0, max(self._tat_for(quota, rate), now) + count / rate - self._burst_seconds(rate) - now)

    def consume(self, counts: Mapping[Quota, int], *, now: float) -> QuotaConsumption:
        """Charge the quotas for pairs that are sent. Return what `refund` needs to undo it."""
        self._tat = {account: until for account, until in self._tat.items() if until > now}
        consumption = {}
        for quota, count in counts.items():
            rate = self._rate(quota)
            if rate:
                before = self._tat_for(quota, rate)
                self._tat[quota.account] = max(before, now) + count / rate
                consumption[quota.account] = before, self._tat[quota.account]
        return consumption

    def refund(self, consumption: QuotaConsumption) -> None:
        """Return unused quota, unless more was consumed since."""
        for account, (before, after) in consumption.items():
            if self._tat.get(account) == after:
                self._tat[account] = before

    def _rate(self, quota: Quota) -> float:
        return quota.pairs_per_second * PACE / self._replicas()

    def _tat_for(self, quota: Quota, rate: float) -> float:
        return max(self._tat.get(quota.account, 0.0), self._history_start + self._burst_seconds(rate))

    def _burst_seconds(self, rate: float) -> float:
        return max(_MIN_BURST_SECONDS, _BURST_SLOTS * self._slot_seconds, 1 / rate)
