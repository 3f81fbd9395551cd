"""The pairs that wait, by priority and account: what comes next, and what goes into a batch."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.cache_proxy.observability.metrics import LANES, PRIORITIES
from services.cache_proxy.queue.local.fair_queue import Entry, Place
from services.cache_proxy.queue.local.priority_class import Offers, PriorityLanes
from services.cache_proxy.queue.local.quota_limiter import Accounts
from services.cache_proxy.queue.quotas import OTHERS, Quota, QuotasNow, none

_BULK_SHARE = 10  # a tenth of a batch, in pairs and in bytes, is kept for bulk
_MAX_PLACES = 8  # of one pair: whoever comes then waits where it is


@dataclass(frozen=True, slots=True)
class Turn:
    """When a place's turn comes: in how many calls at the latest, and not before its quota allows it."""

    calls: int
    quota_seconds: float = 0.0


def calls_until(priority: str, *, ahead: int, interactive: int, bulk: int, batch_pairs: int) -> int:
    """In how many calls the `ahead` first of a lane go out: bulk has its tenth of each, and what is left."""
    tenth = _tenth(batch_pairs)
    if priority == "interactive":
        return math.ceil(ahead / (batch_pairs - (tenth if bulk else 0)))
    if priority == "bulk":
        behind = math.ceil((interactive + ahead) / batch_pairs)
        return min(behind, math.ceil(ahead / tenth)) if tenth else behind
    return math.ceil((interactive + bulk + ahead) / batch_pairs)


class Lanes:
    """Fair between callers within a priority, and within everybody's quota.

    State: `_lanes`, and `_waiting` with the bytes of all that is in them.
    """

    def __init__(self, accounts: Accounts, quotas: QuotasNow = none) -> None:
        self._accounts = accounts
        self._quotas = quotas
        self._lanes = {name: PriorityLanes(name) for name in LANES}
        self._waiting: dict[bytes, Entry] = {}
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def count(self, priority: str) -> int:
        """How many wait in the lanes of one priority."""
        return len(self._lanes[priority])

    def count_of(self, account: str) -> int:
        """How many places an account has."""
        return sum(lanes.count(account) for lanes in self._lanes.values())

    def ready(self, *, now: float) -> int:
        """How many may go out now."""
        return sum(self._ready(priority, now) for priority in LANES)

    def held(self, *, now: float) -> int:
        """How many wait only because their account's quota is spent."""
        return sum(self.count_of(account) for account in self._known() if not self._allowance(account, now))

    def wait_seconds(self, *, now: float) -> float:
        """How long until any account may send one; `inf` if none waits for that."""
        return min((self._quota_seconds(account, 1, now) for account in self._known()), default=math.inf)

    def turn_of_new(
        self, *, priority: str, account: str | None, caller: str, count: int, batch_pairs: int, now: float,
        within_seconds: float,
    ) -> Turn:  # fmt: skip
        """When the last of so many new pairs of a caller's goes out."""
        lane = self._lanes[priority].lane(account)
        ahead = lane.until(lane.start_of(caller) + count - 1) + count
        last = lane.start_of(caller) + count - 1
        return self._turn(priority, account, ahead, last, batch_pairs, now, within_seconds)

    def turn_of(self, place: Place, *, batch_pairs: int, now: float, within_seconds: float) -> Turn:
        """When one that waits goes out."""
        ahead = self._lanes[place.priority].lane(place.account).until(place.start)
        return self._turn(place.priority, place.account, ahead, place.start, batch_pairs, now, within_seconds)

    def _turn(
        self, priority: str, account: str | None, ahead: int, last: float, batch_pairs: int, now: float,
        within_seconds: float,
    ) -> Turn:  # fmt: skip
        """Of the `ahead` first of a lane. What may go before them only after that time is not counted."""
        lanes, by = self._lanes[priority], now + within_seconds
        quota_seconds = 0.0
        if account is not None:
            first = self._lanes[PRIORITIES[0]].count(account) if priority == PRIORITIES[1] else 0
            quota_seconds = self._quota_seconds(account, first + ahead, now)
            last = lanes.start_of(account) + ahead - 1
            ahead += lanes.own.until(last)
        for other in lanes.accounts:
            if other != account:
                before = math.floor(last - lanes.start_of(other)) + 1
                ahead += max(0, min(before, self._ready_of(lanes, other, by)))
        return Turn(self._calls_until(priority, ahead, batch_pairs, by), quota_seconds)

    def _calls_until(self, priority: str, ahead: int, batch_pairs: int, by: float) -> int:
        interactive, bulk = (self._ready(name, by) for name in PRIORITIES)
        return calls_until(priority, ahead=ahead, interactive=interactive, bulk=bulk, batch_pairs=batch_pairs)

    def entries(self) -> list[Entry]:
        """All that wait."""
        return list(self._waiting.values())

    def oldest_at(self, priorities: Iterable[str] = LANES, *, now: float | None = None) -> float:
        """When the pair at the front of one of these lanes came, the earliest; `inf` if nothing waits.

        `now`: of those only that may go out then.
        """
        found = []
        for priority in priorities:
            allowances = (
                dict.fromkeys(self._known(), math.inf) if now is None else self._allowances(priority, now)
            )
            found += [entry.enqueued_at for entry in self._lanes[priority].oldest(allowances)]
        return min(found, default=math.inf)

    def waits(self, entry: Entry) -> bool:
        """Whether it is here, not in flight or suspect."""
        return self._waiting.get(entry.pair.digest) is entry

    def add(self, entry: Entry, *, front: bool = False) -> None:
        """Have an entry wait at the end of its turns, or at the front."""
        self._waiting[entry.pair.digest] = entry
        self.size_bytes += entry.pair.size_bytes
        for place in entry.places:
            self._lanes[place.priority].add(place, front=front)

    def discard(self, entry: Entry) -> bool:
        """Take an entry out. Whether it waited here."""
        if not self.waits(entry):
            return False
        del self._waiting[entry.pair.digest]
        self.size_bytes -= entry.pair.size_bytes
        for place in entry.places:
            self._lanes[place.priority].remove(place)
        return True

    def place_for(self, entry: Entry, *, priority: str, account: str | None, caller: str) -> Place | None:
        """The place that somebody who joins it gives it; None if it has one that is as good.

        Who is in the same lanes with a worse priority moves (see `join`). If no place is as good and free of
        quotas, it gets one more: it goes out with whichever turn and quota comes first, and no caller waits
        for another's.
        """
        same = next((place for place in entry.places if place.account == account), None)
        if same is not None:
            better = LANES.index(priority) < LANES.index(same.priority)
            return Place(entry, priority, caller, account) if better else None
        free = [LANES.index(place.priority) for place in entry.places if not self._is_limited(place.account)]
        if len(entry.places) >= _MAX_PLACES or (free and min(free) <= LANES.index(priority)):
            return None
        return Place(entry, priority, caller, account)

    def join(self, entry: Entry, new: Place) -> None:
        """Give an entry the place that `place_for` found; one that does not wait now gets it when it does."""
        waits = self.waits(entry)
        for at, place in enumerate(entry.places):
            if place.account == new.account:
                if waits:
                    self._lanes[place.priority].remove(place)
                entry.places[at] = new
                break
        else:
            entry.places.append(new)
        if waits:
            self._lanes[new.priority].add(new)

    def resettle(self) -> None:
        """The quotas are others: who had an account may have none, or now has one."""
        quotas = self._quotas()
        for entry in self.entries():
            self.discard(entry)
            kept: dict[str | None, Place] = {}
            for place in entry.places:
                quota = None if place.priority == "refresh" else quotas.of(place.caller)
                account = None if quota is None else quota.account
                kept.setdefault(account, Place(entry, place.priority, place.caller, account))
            entry.places = list(kept.values())
            self.add(entry)

    def take(self, *, batch_pairs: int, batch_bytes: int, now: float) -> tuple[list[Entry], dict[Quota, int]]:
        """The next batch, at least one pair if one may go; they wait no more. And how many of them each quota
        is to be spent for.
        """  # noqa: D205 - one thought
        chosen = self._compose(batch_pairs=batch_pairs, batch_bytes=batch_bytes, now=now)
        counts: dict[Quota, int] = {}
        for place, tag in chosen:
            self._lanes[place.priority].advance(place, tag)
            if place.entry.paid_by is None and self._is_limited(place.account):
                quota = self._quota(place.account or OTHERS)
                counts[quota] = counts.get(quota, 0) + 1
        for place, _ in chosen:
            self.discard(place.entry)
        return [place.entry for place, _ in chosen], counts

    def _compose(self, *, batch_pairs: int, batch_bytes: int, now: float) -> list[tuple[Place, float]]:
        offers = {
            priority: Offers(self._lanes[priority], self._allowances(priority, now)) for priority in LANES
        }
        chosen: dict[bytes, tuple[Place, float]] = {}
        left_bytes = batch_bytes

        def fill(priority: str, *, pairs: int, size_bytes: int) -> None:
            nonlocal left_bytes
            while pairs > 0 and (place := offers[priority].head()) is not None:
                digest, size = place.entry.pair.digest, place.entry.pair.size_bytes
                if digest in chosen:  # by another of its places
                    offers[priority].skip()
                    continue
                if size > size_bytes:
                    return
                chosen[digest] = place, offers[priority].take()
                pairs, size_bytes, left_bytes = pairs - 1, size_bytes - size, left_bytes - size

        fill("bulk", pairs=_tenth(batch_pairs), size_bytes=batch_bytes // _BULK_SHARE)
        for priority in LANES:
            fill(priority, pairs=batch_pairs - len(chosen), size_bytes=left_bytes)
        if not chosen:  # a pair that is over the bound alone goes alone
            fill(next((name for name in LANES if offers[name].head()), LANES[0]), pairs=1, size_bytes=2**63)
        return list(chosen.values())

    def _ready(self, priority: str, now: float) -> int:
        lanes = self._lanes[priority]
        return len(lanes.own) + sum(self._ready_of(lanes, account, now) for account in lanes.accounts)

    def _ready_of(self, lanes: PriorityLanes, account: str, now: float) -> int:
        oldest = lanes.accounts[account].oldest()
        least = 1 if oldest is not None and oldest.paid_by is not None else 0
        return min(lanes.count(account), max(least, self._left(lanes.priority, account, now)))  # type: ignore[return-value]

    def _allowances(self, priority: str, now: float) -> dict[str, float]:
        return {account: self._left(priority, account, now) for account in self._lanes[priority].accounts}

    def _left(self, priority: str, account: str, now: float) -> float:
        """What an account may send of this priority: its interactive pairs go first."""
        first = self._lanes[PRIORITIES[0]].count(account) if priority == PRIORITIES[1] else 0
        return max(0, self._allowance(account, now) - first)

    def _known(self) -> Sequence[str]:
        return list(dict.fromkeys(itertools.chain(*(lanes.accounts for lanes in self._lanes.values()))))

    def _quota(self, account: str) -> Quota:
        return self._quotas().account(account)

    def _is_limited(self, account: str | None) -> bool:
        return account is not None and self._quota(account).pairs_per_second > 0

    def _allowance(self, account: str, now: float) -> float:
        return self._accounts.allowance(self._quota(account), now=now)

    def _quota_seconds(self, account: str, count: int, now: float) -> float:
        return self._accounts.wait_seconds(self._quota(account), count, now=now)


def _tenth(batch_pairs: int) -> int:
    return math.ceil(batch_pairs / _BULK_SHARE) if batch_pairs > 1 else 0
