"""What accounts have had of the model: GCRA for each that has a quota, as `queue/lua/prelude.lua` has it.

A quota is a ceiling, whether or not the model has room. It is spent when a pair goes out for the first time;
a pair that is sent again was paid for. What is not used is saved up for as long as one and a half of the
limit's slots, a second at least: so a call that comes a little late costs nobody anything.
"""

import math
from collections.abc import Callable, Mapping

from services.cache_proxy.queue.local.gcra import PACE
from services.cache_proxy.queue.quotas import Quota

_BURST_SECONDS, _BURST_SLOTS = 1.0, 1.5
_ROUNDING = 1e-6

Spent = Mapping[str, tuple[float, float]]
"""By account: until when its quota was spent before, and after."""


class Accounts:
    """State: `_spent_until`, by account, of those whose quota is not whole; `_since`, before which nothing is
    known, so that all may just have been spent then.

    `replicas` says by how many a quota is shared, of which each has its part.
    """  # noqa: D205 - one thought

    def __init__(self, *, slot_seconds: float, replicas: Callable[[], int], now: float) -> None:
        self._slot_seconds = slot_seconds
        self._replicas = replicas
        self._since = now
        self._spent_until: dict[str, float] = {}

    def begin(self, *, now: float) -> None:
        """Whatever accounts had elsewhere until now, this process does not know of."""
        self._since = now
        self._spent_until.clear()

    def queued_pairs(self, quota: Quota) -> int:
        """How many pairs of the account's may wait here; 0: any number."""
        return quota.queued_pairs and max(1, quota.queued_pairs // self._replicas())

    def allowance(self, quota: Quota, *, now: float) -> float:
        """How many pairs it may send now; `inf` if it has no such quota."""
        rate = self._rate(quota)
        if not rate:
            return math.inf
        saved_seconds = now + self._burst_seconds(rate) - max(self._until(quota, rate), now)
        return max(0, math.floor(saved_seconds * rate + _ROUNDING))

    def wait_seconds(self, quota: Quota, count: int, *, now: float) -> float:
        """How long until so many pairs of it may have gone."""
        rate = self._rate(quota)
        if not rate:
            return 0.0
        return max(0.0, max(self._until(quota, rate), now) + count / rate - self._burst_seconds(rate) - now)

    def spend(self, counts: Mapping[Quota, int], *, now: float) -> Spent:
        """They go out; what the caller needs to undo it, as long as nobody spent since."""
        self._spent_until = {account: until for account, until in self._spent_until.items() if until > now}
        spent = {}
        for quota, count in counts.items():
            rate = self._rate(quota)
            if rate:
                before = self._until(quota, rate)
                self._spent_until[quota.account] = max(before, now) + count / rate
                spent[quota.account] = before, self._spent_until[quota.account]
        return spent

    def refund(self, spent: Spent) -> None:
        """They did not go out."""
        for account, (before, after) in spent.items():
            if self._spent_until.get(account) == after:
                self._spent_until[account] = before

    def _rate(self, quota: Quota) -> float:
        return quota.pairs_per_second * PACE / self._replicas()

    def _until(self, quota: Quota, rate: float) -> float:
        return max(self._spent_until.get(quota.account, 0.0), self._since + self._burst_seconds(rate))

    def _burst_seconds(self, rate: float) -> float:
        return max(_BURST_SECONDS, _BURST_SLOTS * self._slot_seconds, 1 / rate)
