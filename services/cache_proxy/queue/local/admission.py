"""Who is let into the local queue: by its bounds, the caller's quota, and when the last pair's turn comes."""

import math
from collections.abc import Sequence

from services.cache_proxy.queue import rejections
from services.cache_proxy.queue.interface import Asker, Pair, QueueLimits
from services.cache_proxy.queue.local.call_limiter import CallLimiter
from services.cache_proxy.queue.local.fair_queue import Entry, Place
from services.cache_proxy.queue.local.quota_limiter import Accounts
from services.cache_proxy.queue.local.scheduler import Lanes, Turn
from services.cache_proxy.queue.quotas import Quota, QuotasNow

_DAY_SECONDS = 86_400.0


class Admission:
    """Decides, and changes nothing."""

    def __init__(
        self,
        limits: QueueLimits,
        *,
        lanes: Lanes,
        limiter: CallLimiter,
        accounts: Accounts,
        quotas: QuotasNow,
    ) -> None:
        self._limits = limits
        self._lanes = lanes
        self._limiter = limiter
        self._accounts = accounts
        self._quotas = quotas

    def account_of(self, asker: Asker) -> str | None:
        """Whose quota binds the asker's pairs: nobody's what is refreshed, which fills spare places only."""
        quota = self._quota_of(asker)
        return None if quota is None else quota.account

    def admit(
        self, pairs: Sequence[Pair], joined: Sequence[Entry], asker: Asker, *, now: float, held_pairs: int,
        held_bytes: int,
    ) -> list[Place]:  # fmt: skip
        """The places that joined pairs, which wait already, get of the asker's. Raises `QueueFull`."""
        limits, quota, left_seconds = self._limits, self._quota_of(asker), asker.deadline - now
        waiting = 0 if quota is None else self._lanes.count_of(quota.account)
        queued_pairs = 0 if quota is None else self._accounts.queued_pairs(quota)
        room = queued_pairs - waiting - len(pairs) if queued_pairs else math.inf
        places = self._places(joined, asker, room)
        wait_seconds, quota_seconds = self._wait_seconds(len(pairs), joined, places, asker, now)
        size_bytes = sum(pair.size_bytes for pair in pairs)
        if pairs and room < 0 and quota is not None:
            seconds = -room / quota.pairs_per_second if quota.pairs_per_second else 0.0
            raise rejections.over_queued_pairs(
                quota, waiting=waiting, pairs=len(pairs), wait_seconds=max(wait_seconds, seconds)
            )
        if pairs and held_pairs + len(pairs) > limits.max_pairs:
            raise rejections.full(held_pairs, "pairs", most=limits.max_pairs, wait_seconds=wait_seconds)
        if pairs and held_bytes + size_bytes > limits.max_bytes:
            raise rejections.full(held_bytes, "bytes", most=limits.max_bytes, wait_seconds=wait_seconds)
        if quota_seconds > max(wait_seconds, left_seconds) and quota is not None:
            raise rejections.over_pairs_per_second(
                quota, wait_seconds=quota_seconds, left_seconds=left_seconds
            )
        if wait_seconds > left_seconds:
            raise rejections.late(wait_seconds=wait_seconds, left_seconds=left_seconds)
        return places

    def _places(self, joined: Sequence[Entry], asker: Asker, room: float) -> list[Place]:
        account, places = self.account_of(asker), list[Place]()
        for entry in joined:
            place = self._lanes.place_for(
                entry, priority=asker.priority, account=account, caller=asker.caller
            )
            if place is not None and (len(places) < room or _has_account(entry, account)):
                places.append(place)
        return places

    def _wait_seconds(
        self, fresh: int, joined: Sequence[Entry], places: Sequence[Place], asker: Asker, now: float
    ) -> tuple[float, float]:
        """How long until the last of a request's pairs goes out, as the limit has it and as the quota has it.

        Of the new ones and those that wait in the caller's own turn, and of those joined where they are.
        """
        own, turn, waits = {place.entry.pair.digest: place for place in places}, fresh, [0.0]
        left_seconds = min(_DAY_SECONDS, max(0.0, asker.deadline - now))
        last: dict[tuple[str, str | None], Place] = {}
        for entry in joined:
            place = own.get(entry.pair.digest)
            if place is not None and _has_account(entry, place.account):
                turn += 1
            elif place is not None or len(entry.places) > 1:
                wait = min(self._wait_at(other, now, left_seconds) for other in entry.places)
                if place is None:
                    waits.append(wait)
                elif wait > left_seconds:
                    turn += 1
            else:
                only = entry.places[0]
                known = last.setdefault((only.priority, only.account), only)
                if only.start > known.start:
                    last[only.priority, only.account] = only
        waits += [self._wait_at(place, now, left_seconds) for place in last.values()]
        if not turn:
            return max(waits), 0.0
        new = self._lanes.turn_of_new(
            priority=asker.priority, account=self.account_of(asker), caller=asker.caller, count=turn,
            batch_pairs=self._limits.batch_pairs, now=now, within_seconds=left_seconds,
        )  # fmt: skip
        return max(*waits, self._call_seconds(new, turn, now)), new.quota_seconds

    def _wait_at(self, place: Place, now: float, within_seconds: float) -> float:
        turn = self._lanes.turn_of(
            place, batch_pairs=self._limits.batch_pairs, now=now, within_seconds=within_seconds
        )
        return max(self._call_seconds(turn, 1, now), turn.quota_seconds)

    def _call_seconds(self, turn: Turn, pairs: int, now: float) -> float:
        first_seconds = self._limiter.wait_seconds(min(pairs, self._limits.batch_pairs), now=now)
        return first_seconds + (max(1, turn.calls) - 1) * self._limiter.slot_seconds

    def _quota_of(self, asker: Asker) -> Quota | None:
        return None if asker.priority == "refresh" else self._quotas().of(asker.caller)


def _has_account(entry: Entry, account: str | None) -> bool:
    return any(place.account == account for place in entry.places)
