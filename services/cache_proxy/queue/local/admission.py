"""Decide which requests enter the local queue: by its limits, by quotas and by the expected wait."""

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
    """Checks requests. It changes no state."""

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
        """Return the account that a request's pairs are charged to, None if no quota applies.

        Refreshed pairs have none: they only fill otherwise empty places of a batch.
        """
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
        """Return the positions that a request adds to pairs which it joined and which wait already.

        `pairs` are the request's new pairs. `total_pairs` and `total_bytes` are the size of the queue. Raises
        `QueueFullError` if the request must be rejected.
        """
        limits = self._limits
        quota = self._quota_for(context)
        left_seconds = context.deadline - now
        waiting = 0 if quota is None else self._scheduler.count_for_account(quota.account)
        max_queued_pairs = 0 if quota is None else self._quota_limiter.max_queued_pairs(quota)
        available = max_queued_pairs - waiting - len(pairs) if max_queued_pairs else math.inf
        positions = self._new_positions(joined, context, available)
        wait_seconds, quota_seconds = self._expected_wait_seconds(len(pairs), joined, positions, context, now)
        size_bytes = sum(pair.size_bytes for pair in pairs)
        if pairs and available < 0 and quota is not None:
            seconds = -available / quota.pairs_per_second if quota.pairs_per_second else 0.0
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
        return positions

    def _new_positions(
        self, joined: Sequence[QueuedPair], context: RequestContext, available: float
    ) -> list[QueuePosition]:
        """Return the positions that the request adds, as far as its quota of queued pairs allows."""
        account = self.account_for(context)
        positions: list[QueuePosition] = []
        for entry in joined:
            position = self._scheduler.position_for(
                entry, priority=context.priority, account=account, caller=context.caller
            )
            if position is not None and (len(positions) < available or _has_account(entry, account)):
                positions.append(position)
        return positions

    def _expected_wait_seconds(
        self,
        new_pairs: int,
        joined: Sequence[QueuedPair],
        positions: Sequence[QueuePosition],
        context: RequestContext,
        now: float,
    ) -> tuple[float, float]:
        """Return the time until the last pair of a request is sent: by the rate limit, and by its quota.

        New pairs, and joined ones that move to a position of this request, count in the caller's own turn.
        Other joined pairs are sent in the positions that they have.
        """
        own = {position.entry.pair.digest: position for position in positions}
        own_turn_pairs = new_pairs
        waits = [0.0]
        left_seconds = min(DAY_SECONDS, max(0.0, context.deadline - now))
        last: dict[tuple[str, str | None], QueuePosition] = {}
        for entry in joined:
            position = own.get(entry.pair.digest)
            if position is not None and _has_account(entry, position.account):
                own_turn_pairs += 1
            elif position is not None or len(entry.positions) > 1:
                wait = min(self._position_wait_seconds(other, now, left_seconds) for other in entry.positions)
                if position is None:
                    waits.append(wait)
                elif wait > left_seconds:
                    own_turn_pairs += 1
            else:
                # Of many joined pairs in one queue, only the last needs an estimate.
                only = entry.positions[0]
                known = last.setdefault((only.priority, only.account), only)
                if only.start_tag > known.start_tag:
                    last[only.priority, only.account] = only
        waits += [self._position_wait_seconds(one, now, left_seconds) for one in last.values()]
        if not own_turn_pairs:
            return max(waits), 0.0
        turn = self._scheduler.expected_turn_of_new(
            priority=context.priority,
            account=self.account_for(context),
            caller=context.caller,
            count=own_turn_pairs,
            batch_pairs=self._limits.batch_pairs,
            now=now,
            horizon_seconds=left_seconds,
        )
        return max(*waits, self._seconds_until_call(turn, own_turn_pairs, now)), turn.quota_wait_seconds

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
    return any(position.account == account for position in entry.positions)
