"""The pairs that wait, by priority and account: what comes next, and what goes into a batch."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.cache_proxy.domain import PRIORITIES, PRIORITY_CLASSES
from services.cache_proxy.queue.expected_calls import BULK_SHARE_DIVISOR, bulk_reserve, calls_until
from services.cache_proxy.queue.local.fair_queue import QueuedPair, QueuePosition
from services.cache_proxy.queue.local.priority_class import CandidateHeap, PriorityClass
from services.cache_proxy.queue.local.quota_limiter import QuotaLimiter
from services.cache_proxy.queue.quotas import DEFAULT_ACCOUNT, Quota, QuotaProvider, no_quotas

_MAX_POSITIONS = 8  # of one pair: whoever comes then waits where it is


@dataclass(frozen=True, slots=True)
class ExpectedTurn:
    """When a place's turn comes: in how many calls at the latest, and not before its quota allows it."""

    calls: int
    quota_wait_seconds: float = 0.0


class BatchScheduler:
    """Fair between callers within a priority, and within everybody's quota.

    State: `_lanes`, and `_waiting` with the bytes of all that is in them.
    """

    def __init__(self, quota_limiter: QuotaLimiter, quotas: QuotaProvider = no_quotas) -> None:
        self._quota_limiter = quota_limiter
        self._quotas = quotas
        self._classes = {name: PriorityClass(name) for name in PRIORITY_CLASSES}
        self._waiting: dict[bytes, QueuedPair] = {}
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def count(self, priority: str) -> int:
        """How many wait in the lanes of one priority."""
        return len(self._classes[priority])

    def count_for_account(self, account: str) -> int:
        """How many places an account has."""
        return sum(lanes.count(account) for lanes in self._classes.values())

    def eligible_count(self, *, now: float) -> int:
        """How many may go out now."""
        return sum(self._eligible(priority, now) for priority in PRIORITY_CLASSES)

    def quota_blocked_count(self, *, now: float) -> int:
        """How many wait only because their account's quota is spent."""
        return sum(
            self.count_for_account(account)
            for account in self._account_names()
            if not self._available_quota(account, now)
        )

    def quota_wait_seconds(self, *, now: float) -> float:
        """How long until any account may send one; `inf` if none waits for that."""
        return min(
            (self._quota_wait_seconds(account, 1, now) for account in self._account_names()), default=math.inf
        )

    def expected_turn_of_new(
        self,
        *,
        priority: str,
        account: str | None,
        caller: str,
        count: int,
        batch_pairs: int,
        now: float,
        horizon_seconds: float,
    ) -> ExpectedTurn:
        """When the last of so many new pairs of a caller's goes out."""
        lane = self._classes[priority].queue_for(account)
        ahead = lane.count_through(lane.start_tag(caller) + count - 1) + count
        last = lane.start_tag(caller) + count - 1
        return self._expected_turn(priority, account, ahead, last, batch_pairs, now, horizon_seconds)

    def expected_turn(
        self, position: QueuePosition, *, batch_pairs: int, now: float, horizon_seconds: float
    ) -> ExpectedTurn:
        """When one that waits goes out."""
        ahead = self._classes[position.priority].queue_for(position.account).count_through(position.start_tag)
        return self._expected_turn(
            position.priority, position.account, ahead, position.start_tag, batch_pairs, now, horizon_seconds
        )

    def _expected_turn(
        self,
        priority: str,
        account: str | None,
        ahead: int,
        last: float,
        batch_pairs: int,
        now: float,
        horizon_seconds: float,
    ) -> ExpectedTurn:
        """Of the `ahead` first of a lane. What may go before them only after that time is not counted."""
        lanes, by = self._classes[priority], now + horizon_seconds
        quota_seconds = 0.0
        if account is not None:
            first = self._classes[PRIORITIES[0]].count(account) if priority == PRIORITIES[1] else 0
            quota_seconds = self._quota_wait_seconds(account, first + ahead, now)
            last = lanes.start_tag(account) + ahead - 1
            ahead += lanes.default_queue.count_through(last)
        for other in lanes.account_queues:
            if other != account:
                before = math.floor(last - lanes.start_tag(other)) + 1
                ahead += max(0, min(before, self._eligible_of_account(lanes, other, by)))
        return ExpectedTurn(self._calls_until(priority, ahead, batch_pairs, by), quota_seconds)

    def _calls_until(self, priority: str, ahead: int, batch_pairs: int, by: float) -> int:
        interactive, bulk = (self._eligible(name, by) for name in PRIORITIES)
        return calls_until(priority, ahead=ahead, interactive=interactive, bulk=bulk, batch_pairs=batch_pairs)

    def entries(self) -> list[QueuedPair]:
        """All that wait."""
        return list(self._waiting.values())

    def oldest_at(self, priorities: Iterable[str] = PRIORITY_CLASSES, *, now: float | None = None) -> float:
        """When the pair at the front of one of these lanes came, the earliest; `inf` if nothing waits.

        `now`: of those only that may go out then.
        """
        found = []
        for priority in priorities:
            allowances = (
                dict.fromkeys(self._account_names(), math.inf)
                if now is None
                else self._remaining_quotas(priority, now)
            )
            found += [entry.enqueued_at for entry in self._classes[priority].oldest_eligible(allowances)]
        return min(found, default=math.inf)

    def is_waiting(self, entry: QueuedPair) -> bool:
        """Whether it is here, not in flight or suspect."""
        return self._waiting.get(entry.pair.digest) is entry

    def add(self, entry: QueuedPair, *, at_front: bool = False) -> None:
        """Have an entry wait at the end of its turns, or at the front."""
        self._waiting[entry.pair.digest] = entry
        self.size_bytes += entry.pair.size_bytes
        for place in entry.positions:
            self._classes[place.priority].add(place, at_front=at_front)

    def discard(self, entry: QueuedPair) -> bool:
        """Take an entry out. Whether it waited here."""
        if not self.is_waiting(entry):
            return False
        del self._waiting[entry.pair.digest]
        self.size_bytes -= entry.pair.size_bytes
        for place in entry.positions:
            self._classes[place.priority].remove(place)
        return True

    def position_for(
        self, entry: QueuedPair, *, priority: str, account: str | None, caller: str
    ) -> QueuePosition | None:
        """The place that somebody who joins it gives it; None if it has one that is as good.

        Who is in the same lanes with a worse priority moves (see `join`). If no place is as good and free of
        quotas, it gets one more: it goes out with whichever turn and quota comes first, and no caller waits
        for another's.
        """
        same = next((place for place in entry.positions if place.account == account), None)
        if same is not None:
            better = PRIORITY_CLASSES.index(priority) < PRIORITY_CLASSES.index(same.priority)
            return QueuePosition(entry, priority, caller, account) if better else None
        free = [
            PRIORITY_CLASSES.index(place.priority)
            for place in entry.positions
            if not self._is_rate_limited(place.account)
        ]
        if len(entry.positions) >= _MAX_POSITIONS or (free and min(free) <= PRIORITY_CLASSES.index(priority)):
            return None
        return QueuePosition(entry, priority, caller, account)

    def add_position(self, entry: QueuedPair, position: QueuePosition) -> None:
        """Give an entry the place that `place_for` found; one that does not wait now gets it when it does."""
        waits = self.is_waiting(entry)
        for at, place in enumerate(entry.positions):
            if place.account == position.account:
                if waits:
                    self._classes[place.priority].remove(place)
                entry.positions[at] = position
                break
        else:
            entry.positions.append(position)
        if waits:
            self._classes[position.priority].add(position)

    def reassign_quotas(self) -> None:
        """The quotas are others: who had an account may have none, or now has one."""
        quotas = self._quotas()
        for entry in self.entries():
            self.discard(entry)
            kept: dict[str | None, QueuePosition] = {}
            for place in entry.positions:
                quota = None if place.priority == "refresh" else quotas.for_caller(place.caller)
                account = None if quota is None else quota.account
                kept.setdefault(account, QueuePosition(entry, place.priority, place.caller, account))
            entry.positions = list(kept.values())
            self.add(entry)

    def take_batch(
        self, *, batch_pairs: int, batch_bytes: int, now: float
    ) -> tuple[list[QueuedPair], dict[Quota, int]]:
        """The next batch, at least one pair if one may go; they wait no more. And how many of them each quota
        is to be spent for.
        """  # noqa: D205 - one thought
        chosen = self._select_batch(batch_pairs=batch_pairs, batch_bytes=batch_bytes, now=now)
        counts: dict[Quota, int] = {}
        for place, tag in chosen:
            self._classes[place.priority].advance(place, tag)
            if place.entry.charged_claim is None and self._is_rate_limited(place.account):
                quota = self._quota_for(place.account or DEFAULT_ACCOUNT)
                counts[quota] = counts.get(quota, 0) + 1
        for place, _ in chosen:
            self.discard(place.entry)
        return [place.entry for place, _ in chosen], counts

    def _select_batch(
        self, *, batch_pairs: int, batch_bytes: int, now: float
    ) -> list[tuple[QueuePosition, float]]:
        offers = {
            priority: CandidateHeap(self._classes[priority], self._remaining_quotas(priority, now))
            for priority in PRIORITY_CLASSES
        }
        chosen: dict[bytes, tuple[QueuePosition, float]] = {}
        left_bytes = batch_bytes

        def fill(priority: str, *, pairs: int, size_bytes: int) -> None:
            nonlocal left_bytes
            while pairs > 0 and (place := offers[priority].peek()) is not None:
                digest, size = place.entry.pair.digest, place.entry.pair.size_bytes
                if digest in chosen:  # by another of its places
                    offers[priority].skip()
                    continue
                if size > size_bytes:
                    return
                chosen[digest] = place, offers[priority].pop()
                pairs, size_bytes, left_bytes = pairs - 1, size_bytes - size, left_bytes - size

        fill("bulk", pairs=bulk_reserve(batch_pairs), size_bytes=batch_bytes // BULK_SHARE_DIVISOR)
        for priority in PRIORITY_CLASSES:
            fill(priority, pairs=batch_pairs - len(chosen), size_bytes=left_bytes)
        if not chosen:  # a pair that is over the bound alone goes alone
            fill(
                next((name for name in PRIORITY_CLASSES if offers[name].peek()), PRIORITY_CLASSES[0]),
                pairs=1,
                size_bytes=2**63,
            )
        return list(chosen.values())

    def _eligible(self, priority: str, now: float) -> int:
        lanes = self._classes[priority]
        return len(lanes.default_queue) + sum(
            self._eligible_of_account(lanes, account, now) for account in lanes.account_queues
        )

    def _eligible_of_account(self, priority_class: PriorityClass, account: str, now: float) -> int:
        oldest = priority_class.account_queues[account].oldest()
        least = 1 if oldest is not None and oldest.charged_claim is not None else 0
        return min(
            priority_class.count(account),
            max(least, self._remaining_quota(priority_class.priority, account, now)),
        )  # type: ignore[return-value]

    def _remaining_quotas(self, priority: str, now: float) -> dict[str, float]:
        return {
            account: self._remaining_quota(priority, account, now)
            for account in self._classes[priority].account_queues
        }

    def _remaining_quota(self, priority: str, account: str, now: float) -> float:
        """What an account may send of this priority: its interactive pairs go first."""
        first = self._classes[PRIORITIES[0]].count(account) if priority == PRIORITIES[1] else 0
        return max(0, self._available_quota(account, now) - first)

    def _account_names(self) -> Sequence[str]:
        return list(
            dict.fromkeys(itertools.chain(*(lanes.account_queues for lanes in self._classes.values())))
        )

    def _quota_for(self, account: str) -> Quota:
        return self._quotas().for_account(account)

    def _is_rate_limited(self, account: str | None) -> bool:
        return account is not None and self._quota_for(account).pairs_per_second > 0

    def _available_quota(self, account: str, now: float) -> float:
        return self._quota_limiter.available(self._quota_for(account), now=now)

    def _quota_wait_seconds(self, account: str, count: int, now: float) -> float:
        return self._quota_limiter.wait_seconds(self._quota_for(account), count, now=now)
