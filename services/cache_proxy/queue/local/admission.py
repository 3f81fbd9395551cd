"""Who is let into the local queue: by its bounds, the caller's quota, and when the last pair's turn comes."""

import math
from collections.abc import Sequence

from services.cache_proxy.domain import DAY_SECONDS, REFRESH, Pair
from services.cache_proxy.queue import rejections
from services.cache_proxy.queue.interface import QueueLimits, RequestContext
from services.cache_proxy.queue.local.call_limiter import CallLimiter
from services.cache_proxy.queue.local.fair_queue import QueuedPair, QueuePosition
from services.cache_proxy.queue.local.quota_limiter import QuotaLimiter
from services.cache_proxy.queue.local.scheduler import BatchScheduler, ExpectedTurn
from services.cache_proxy.queue.quotas import Quota, QuotaProvider


class Admission:
    """Decides, and changes nothing."""

    def __init__(
        self,
        limits: QueueLimits,
        *,
        scheduler: BatchScheduler,
        limiter: CallLimiter,
        quota_limiter: QuotaLimiter,
        quotas: QuotaProvider,
    ) -> None:
        self._limits = limits
        self._scheduler = scheduler
        self._limiter = limiter
        self._quota_limiter = quota_limiter
        self._quotas = quotas

    def account_for(self, context: RequestContext) -> str | None:
        """Whose quota binds the asker's pairs: nobody's what is refreshed, which fills spare places only."""
        quota = self._quota_for(context)
        return None if quota is None else quota.account

    def admit(
        self,
        pairs: Sequence[Pair],
        joined: Sequence[QueuedPair],
        context: RequestContext,
        *,
        now: float,
        total_pairs: int,
        total_bytes: int,
    ) -> list[QueuePosition]:
        """The places that joined pairs, which wait already, get of the asker's. Raises `QueueFullError`."""
        limits, quota, left_seconds = self._limits, self._quota_for(context), context.deadline - now
        waiting = 0 if quota is None else self._scheduler.count_for_account(quota.account)
        queued_pairs = 0 if quota is None else self._quota_limiter.max_queued_pairs(quota)
        room = queued_pairs - waiting - len(pairs) if queued_pairs else math.inf
        places = self._new_positions(joined, context, room)
        wait_seconds, quota_seconds = self._expected_wait_seconds(len(pairs), joined, places, context, now)
        size_bytes = sum(pair.size_bytes for pair in pairs)
        if pairs and room < 0 and quota is not None:
            seconds = -room / quota.pairs_per_second if quota.pairs_per_second else 0.0
            raise rejections.queued_pairs_quota_error(
                quota, waiting=waiting, pairs=len(pairs), wait_seconds=max(wait_seconds, seconds)
            )
        if pairs and total_pairs + len(pairs) > limits.max_pairs:
            raise rejections.queue_full_error(
                total_pairs, "pairs", max_held=limits.max_pairs, wait_seconds=wait_seconds
            )
        if pairs and total_bytes + size_bytes > limits.max_bytes:
            raise rejections.queue_full_error(
                total_bytes, "bytes", max_held=limits.max_bytes, wait_seconds=wait_seconds
            )
        if quota_seconds > max(wait_seconds, left_seconds) and quota is not None:
            raise rejections.pairs_rate_quota_error(
                quota, wait_seconds=quota_seconds, left_seconds=left_seconds
            )
        if wait_seconds > left_seconds:
            raise rejections.deadline_error(wait_seconds=wait_seconds, left_seconds=left_seconds)
        return places

    def _new_positions(
        self, joined: Sequence[QueuedPair], context: RequestContext, room: float
    ) -> list[QueuePosition]:
        account, places = self.account_for(context), list[QueuePosition]()
        for entry in joined:
            place = self._scheduler.position_for(
                entry, priority=context.priority, account=account, caller=context.caller
            )
            if place is not None and (len(places) < room or _has_account(entry, account)):
                places.append(place)
        return places

    def _expected_wait_seconds(
        self,
        new_pairs: int,
        joined: Sequence[QueuedPair],
        positions: Sequence[QueuePosition],
        context: RequestContext,
        now: float,
    ) -> tuple[float, float]:
        """How long until the last of a request's pairs goes out, as the limit has it and as the quota has it.

        Of the new ones and those that wait in the caller's own turn, and of those joined where they are.
        """
        own, turn, waits = {place.entry.pair.digest: place for place in positions}, new_pairs, [0.0]
        left_seconds = min(DAY_SECONDS, max(0.0, context.deadline - now))
        last: dict[tuple[str, str | None], QueuePosition] = {}
        for entry in joined:
            place = own.get(entry.pair.digest)
            if place is not None and _has_account(entry, place.account):
                turn += 1
            elif place is not None or len(entry.positions) > 1:
                wait = min(self._position_wait_seconds(other, now, left_seconds) for other in entry.positions)
                if place is None:
                    waits.append(wait)
                elif wait > left_seconds:
                    turn += 1
            else:
                only = entry.positions[0]
                known = last.setdefault((only.priority, only.account), only)
                if only.start_tag > known.start_tag:
                    last[only.priority, only.account] = only
        waits += [self._position_wait_seconds(place, now, left_seconds) for place in last.values()]
        if not turn:
            return max(waits), 0.0
        new = self._scheduler.expected_turn_of_new(
            priority=context.priority,
            account=self.account_for(context),
            caller=context.caller,
            count=turn,
            batch_pairs=self._limits.batch_pairs,
            now=now,
            horizon_seconds=left_seconds,
        )
        return max(*waits, self._seconds_until_call(new, turn, now)), new.quota_wait_seconds

    def _position_wait_seconds(self, position: QueuePosition, now: float, horizon_seconds: float) -> float:
        turn = self._scheduler.expected_turn(
            position, batch_pairs=self._limits.batch_pairs, now=now, horizon_seconds=horizon_seconds
        )
        return max(self._seconds_until_call(turn, 1, now), turn.quota_wait_seconds)

    def _seconds_until_call(self, turn: ExpectedTurn, pairs: int, now: float) -> float:
        first_seconds = self._limiter.wait_seconds(min(pairs, self._limits.batch_pairs), now=now)
        return first_seconds + (max(1, turn.calls) - 1) * self._limiter.slot_seconds

    def _quota_for(self, context: RequestContext) -> Quota | None:
        return None if context.priority == REFRESH else self._quotas().for_caller(context.caller)


def _has_account(entry: QueuedPair, account: str | None) -> bool:
    return any(place.account == account for place in entry.positions)
