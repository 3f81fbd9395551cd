"""What accounts have had of the model: GCRA for each that has a quota, as `queue/lua/prelude.lua` has it.

A quota is a ceiling, whether or not the model has room. It is spent when a pair goes out for the first time;
a pair that is sent again was paid for. What is not used is saved up for as long as one and a half of the
limit's slots, a second at least: so a call that comes a little late costs nobody anything.
"""

import math
from collections.abc import Callable, Mapping

from services.cache_proxy.domain import PACE
from services.cache_proxy.queue.quotas import Quota

_MIN_BURST_SECONDS, _BURST_SLOTS = 1.0, 1.5
_ROUNDING_TOLERANCE = 1e-6

QuotaConsumption = Mapping[str, tuple[float, float]]
"""By account: until when its quota was spent before, and after."""


class QuotaLimiter:
    """State: `_spent_until`, by account, of those whose quota is not whole; `_since`, before which nothing is
    known, so that all may just have been spent then.

    `replicas` says by how many a quota is shared, of which each has its part.
    """  # noqa: D205 - one thought

    def __init__(self, *, slot_seconds: float, replicas: Callable[[], int], now: float) -> None:
        self._slot_seconds = slot_seconds
        self._replicas = replicas
        self._history_start = now
        self._tat: dict[str, float] = {}

    def reset(self, *, now: float) -> None:
        """Whatever accounts had elsewhere until now, this process does not know of."""
        self._history_start = now
        self._tat.clear()

    def max_queued_pairs(self, quota: Quota) -> int:
        """How many pairs of the account's may wait here; 0: any number."""
        return quota.queued_pairs and max(1, quota.queued_pairs // self._replicas())

    def available(self, quota: Quota, *, now: float) -> float:
        """How many pairs it may send now; `inf` if it has no such quota."""
        rate = self._rate(quota)
        if not rate:
            return math.inf
        saved_seconds = now + self._burst_seconds(rate) - max(self._tat_for(quota, rate), now)
        return max(0, math.floor(saved_seconds * rate + _ROUNDING_TOLERANCE))

    def wait_seconds(self, quota: Quota, count: int, *, now: float) -> float:
        """How long until so many pairs of it may have gone."""
        rate = self._rate(quota)
        if not rate:
            return 0.0
        return max(0.0, max(self._tat_for(quota, rate), now) + count / rate - self._burst_seconds(rate) - now)

    def consume(self, counts: Mapping[Quota, int], *, now: float) -> QuotaConsumption:
        """They go out; what the caller needs to undo it, as long as nobody spent since."""
        self._tat = {account: until for account, until in self._tat.items() if until > now}
        spent = {}
        for quota, count in counts.items():
            rate = self._rate(quota)
            if rate:
                before = self._tat_for(quota, rate)
                self._tat[quota.account] = max(before, now) + count / rate
                spent[quota.account] = before, self._tat[quota.account]
        return spent

    def refund(self, consumption: QuotaConsumption) -> None:
        """They did not go out."""
        for account, (before, after) in consumption.items():
            if self._tat.get(account) == after:
                self._tat[account] = before

    def _rate(self, quota: Quota) -> float:
        return quota.pairs_per_second * PACE / self._replicas()

    def _tat_for(self, quota: Quota, rate: float) -> float:
        return max(self._tat.get(quota.account, 0.0), self._history_start + self._burst_seconds(rate))

    def _burst_seconds(self, rate: float) -> float:
        return max(_MIN_BURST_SECONDS, _BURST_SLOTS * self._slot_seconds, 1 / rate)
