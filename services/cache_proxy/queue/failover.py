"""The queue that requests use: the shared one while Redis can be reached, else a local one.

The module has more than 250 lines, since it wraps every method of the queue. Failover, return and the claims
that end between the two share one state, and are easier to follow in one place.
"""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Coroutine, Mapping, Sequence

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import (
    ModelUnavailableError,
    PairError,
    QueueFormatError,
    StoreAccessDeniedError,
    StoreDamagedError,
    StoreError,
)
from services.cache_proxy.queue.interface import Claim, ClaimDeferred, EnqueueResult, Queue, RequestContext
from services.cache_proxy.queue.local.local_queue import LocalQueue
from services.cache_proxy.queue.outage import MIN_BACKOFF_SECONDS
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.snapshot import QueueSnapshot
from services.cache_proxy.queue.time_slots import Membership, TimeSlotLimiter
from services.common.compat import override

_log = logging.getLogger(__name__)

# So long after a replica's last heartbeat, those who still have Redis leave its slots free.
_SILENCE_GRACE_SECONDS = 1.2

# A process that runs finds Redis lost sooner than this: one that took longer was paused.
_PAUSE_DETECTION_SECONDS = 2.5

_MAX_UNPUBLISHED_OUTCOMES = 200_000
_PUBLISH_CHUNK_PAIRS = 500
_DAMAGED_ADVICE = "a key of the queue is damaged, and resetting the queue did not repair it"


class FailoverQueue(Queue):
    """Queue that moves waiting pairs between the shared queue and a local one.

    The interest table of the shared queue always has all pairs for which requests wait here. While Redis is
    lost, the same pairs wait in the local queue, too. When Redis is back, those that are not in a call are
    taken out of the local queue and enqueued in the shared one. A pair that ends in the local queue is
    resolved in the interest table, so it is never enqueued again.

    State, touched only from the event loop:

    - `_is_redis_lost`: which of the two queues is in use.
    - `_local_claims`: the claims of the local queue, to know which queue a claim belongs to.
    - `_unpublished_outcomes`: outcomes that were not published yet.
    - `_last_heartbeat_at`: when Redis last received a heartbeat of this replica.
    - `_other_format`: the format of the shared queue, if it is not this replica's.
    """

    def __init__(self, *, shared: RedisQueue, local: LocalQueue, limiter: TimeSlotLimiter) -> None:
        self._shared = shared
        self._local = local
        self._limiter = limiter
        self._is_redis_lost = False
        self._last_heartbeat_at = -math.inf
        self._local_claims: set[Claim] = set()
        self._unpublished_outcomes: dict[bytes, Outcome] = {}
        self._other_format: int | None = None
        self._changed = asyncio.Event()
        self._access_granted = asyncio.Event()
        self._access_granted.set()
        self.blocking_error: StoreError | None = None
        """Why this replica may not use the shared queue although Redis answers; None while it may."""
        self.last_loss: tuple[str, float] | None = None
        """Why Redis was lost, and when, on time.monotonic."""

    @property
    def is_redis_lost(self) -> bool:
        """Return whether the local queue is in use."""
        return self._is_redis_lost

    @property
    def is_on_standby(self) -> bool:
        """Return whether replicas of another queue format use the shared queue."""
        return self._other_format is not None

    async def wait_for_access(self) -> None:
        """Return when Redis denies this replica nothing, or did not when the replica became ready."""
        await self._access_granted.wait()

    def on_access_granted(self) -> None:
        """Record that a check found all rights that this replica needs."""
        if self.blocking_error is not None:
            self.blocking_error = None
            _log.info("Redis refuses this replica nothing any more")
        self._access_granted.set()

    @property
    @override
    def store_before_complete(self) -> bool:
        return self._shared.store_before_complete

    @override
    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        if not self._is_redis_lost:
            try:
                return await self._shared.enqueue(pairs, context)
            except StoreError as error:
                await self.fail_over(error)
        # The interest table must have the pairs before the local queue does: it resolves them if they end
        # while they are admitted.
        interest = self._shared.interest
        new_digests = interest.register(pairs, context)
        result = await self._local.enqueue(pairs, context)
        interest.add_requester(pairs, context)
        interest.apply_known_outcomes(result.outcomes, new_digests=new_digests)
        return result

    @override
    async def cancel(self, digests: Sequence[bytes]) -> None:
        await self._local.cancel(digests)
        try:
            await self._shared.cancel(digests, notify_redis=not self._is_redis_lost)
        except StoreError as error:
            await self.fail_over(error)

    @override
    async def claim(self) -> Claim | ClaimDeferred:
        if not self._is_redis_lost:
            try:
                return await self._shared.claim()
            except StoreError as error:
                await self.fail_over(error)
        decision = await self._local.claim()
        if isinstance(decision, Claim):
            self._local_claims.add(decision)
        return decision

    @override
    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        if claim in self._local_claims:
            return await self._local.postpone_slot(claim, seconds=seconds)
        if not self._is_redis_lost:
            try:
                return await self._shared.postpone_slot(claim, seconds=seconds)
            except StoreError as error:
                await self.fail_over(error)
        # The slot was Redis's, and it cannot be moved any more.
        return False

    @override
    async def release(self, claim: Claim) -> None:
        if claim in self._local_claims:
            await self._local.release(claim)
            await self._after_local_claim(claim)
        else:
            await self._after_shared_claim(claim, self._shared.release(claim))

    @override
    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        # The waiting requests get their outcomes whatever the state of Redis, and whichever queue the claim
        # came from. A local claim is kept until all of its pairs have ended: some may end before the call,
        # since they were found in the cache.
        if claim in self._local_claims:
            await self._local.complete(claim, outcomes, inferred=inferred)
            if not self._local.has_unfinished_pairs(claim):
                self._local_claims.discard(claim)
        else:
            self._local.complete_elsewhere(outcomes)
        if not self._is_redis_lost:
            try:
                await self._shared.complete(claim, outcomes, inferred=inferred)
            except StoreError as error:
                await self.fail_over(error)
            else:
                return
        # They are published on the return. Beyond a bound the oldest outcomes are dropped.
        self._shared.claims.complete_locally(claim, outcomes)
        self._unpublished_outcomes.update(outcomes)
        while len(self._unpublished_outcomes) > _MAX_UNPUBLISHED_OUTCOMES:
            del self._unpublished_outcomes[next(iter(self._unpublished_outcomes))]

    @override
    async def fail(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None = None,
        model_fault: bool = False,
        unsent: bool = False,
    ) -> None:
        if claim in self._local_claims:
            await self._local.fail(
                claim, error, retry_after_seconds=retry_after_seconds, model_fault=model_fault, unsent=unsent
            )
            await self._after_local_claim(claim)
        else:
            # The local queue keeps to the backoff, too, if it is the one in use next.
            backoff_seconds = MIN_BACKOFF_SECONDS if retry_after_seconds is None else retry_after_seconds
            self._limiter.block_until(time.monotonic() + backoff_seconds)
            report = self._shared.fail(
                claim, error, retry_after_seconds=retry_after_seconds, model_fault=model_fault, unsent=unsent
            )
            await self._after_shared_claim(claim, report)

    @override
    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        if claim in self._local_claims:
            await self._local.reject(claim, error, errors_by_digest)
            await self._after_local_claim(claim)
        else:
            await self._after_shared_claim(claim, self._shared.reject(claim, error, errors_by_digest))

    @override
    async def wait_for_change(self) -> None:
        events = (self._shared.wait_for_change(), self._local.wait_for_change(), self._changed.wait())
        waits: list[asyncio.Future[object]] = [asyncio.ensure_future(event) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._changed.clear()
            for wait in waits:
                wait.cancel()

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:
        """Return the state of the queue in use. Raises `StoreError`, which does not count as lost Redis."""
        if self._is_redis_lost:
            return await self._local.snapshot(minutes=minutes)
        return await self._shared.snapshot(minutes=minutes)

    def discard(self, digest: bytes) -> None:
        """Forget a remembered outcome of this pair, and do not publish it: it was invalidated."""
        self._local.discard(digest)
        self._unpublished_outcomes.pop(digest, None)

    def discard_all(self) -> None:
        """Forget all remembered outcomes, and publish none."""
        self._local.discard_all()
        self._unpublished_outcomes.clear()

    def fail_all(self, error: PairError) -> None:
        """End every pair with the error: the process is about to end."""
        self._local.fail_all(error)
        self._shared.interest.fail_all(error)

    def show_local_metrics(self) -> None:
        """Set the gauges that describe all replicas to the local queue's state."""
        self._local.show_local_metrics()

    def on_heartbeat(self, membership: Membership, *, received_after: float) -> None:
        """Record the reply of a heartbeat that Redis received at this time or later, on time.monotonic."""
        self._limiter.update_membership(membership)
        self._last_heartbeat_at = received_after
        self._limiter.not_before = received_after + _SILENCE_GRACE_SECONDS

    def stand_by(self, membership: Membership, *, not_before: float) -> None:
        """Use the slots of a member beside replicas of another queue format, but none before a time."""
        self._limiter.not_before = not_before
        if self._limiter.stand_by(membership):
            self._changed.set()

    async def fail_over(self, error: StoreError) -> None:
        """Use the local queue from now on, and let the waiting pairs wait there: Redis is lost."""
        self._record_blocking_error(error)
        self._record_format(error)
        if self._is_redis_lost:
            return
        self._is_redis_lost = True
        self.last_loss = (error.kind, time.monotonic())
        if self.blocking_error is None and not self.is_on_standby:
            _log.warning("the shared queue is lost, going on alone: %s", error)
        self._local.reset_quotas()
        # After a pause of this process the others may already be using its slots. It waits until they have
        # noticed that it is back but silent.
        now = time.monotonic()
        if now - self._last_heartbeat_at > _PAUSE_DETECTION_SECONDS:
            self._limiter.not_before = now + _SILENCE_GRACE_SECONDS
        self._activate_local()

    def _record_blocking_error(self, error: StoreError) -> None:
        """Log once what Redis denies. A replica that was ready before stays ready."""
        if not isinstance(error, StoreAccessDeniedError | StoreDamagedError):
            return
        if self.blocking_error is None or str(self.blocking_error) != str(error):
            is_denied = isinstance(error, StoreAccessDeniedError)
            advice = "see deploy/redis/users.acl" if is_denied else _DAMAGED_ADVICE
            _log.error("this replica leaves the shared queue until that is mended: %s (%s)", error, advice)
        self.blocking_error = error
        if not math.isfinite(self._last_heartbeat_at):
            self._access_granted.clear()

    def _record_format(self, error: StoreError) -> None:
        """Log once that the shared queue has another format, and use the slots of a silent member."""
        if not isinstance(error, QueueFormatError):
            return
        self._limiter.stand_by()
        if self._other_format != error.found:
            _log.warning(
                "%s: it uses a local queue, within its share of the rate limit, and joins when no replica of "
                "format %d is left (finish the update, or roll it back)",
                error,
                error.found,
            )
        self._other_format = error.found

    def _activate_local(self) -> None:
        for pair, context in self._shared.unclaimed_pairs():
            self._local.adopt(pair, context)
        self._changed.set()

    async def fail_back(self) -> None:
        """Use the shared queue again, and let the waiting pairs wait there. Raises `StoreError`.

        Pairs that are in a call stay in the local queue until their calls end.
        """
        await self._publish_outcomes()
        # First round, while requests still use the local queue. If it fails, the pairs go back there.
        earlier = self._shared.interest.snapshot()
        try:
            await self._shared.re_enqueue(exclude=self._local.remove_waiting())
        except StoreError:
            self._activate_local()
            raise
        self._is_redis_lost = False
        self._other_format = None
        _log.info("the shared queue is back")
        self._changed.set()
        # Second, short round for what changed during the first: pairs that came, that were cancelled and
        # requested again, and that other requests joined. Nothing more can come to the local queue.
        try:
            unchanged = self._shared.interest.unchanged_since(earlier)
            await self._shared.re_enqueue(exclude=unchanged | self._local.remove_waiting())
        except StoreError as error:
            await self.fail_over(error)

    async def _publish_outcomes(self) -> None:
        """Publish, chunk by chunk, what ended while Redis was lost."""
        while self._unpublished_outcomes:
            chunk = dict(itertools.islice(self._unpublished_outcomes.items(), _PUBLISH_CHUNK_PAIRS))
            await self._shared.claims.publish(chunk)
            # An outcome that was discarded or replaced while the script ran is not removed.
            for digest, outcome in chunk.items():
                if self._unpublished_outcomes.get(digest) is outcome:
                    del self._unpublished_outcomes[digest]

    async def _after_local_claim(self, claim: Claim) -> None:
        """Forget a local claim that has ended.

        If Redis came back meanwhile, its pairs without an outcome must wait in the shared queue.
        """
        self._local_claims.discard(claim)
        if not self._is_redis_lost:
            try:
                await self._shared.re_enqueue(exclude=self._local.remove_waiting())
            except StoreError as error:
                await self.fail_over(error)

    async def _after_shared_claim(self, claim: Claim, report: Coroutine[None, None, None]) -> None:
        """Report to Redis how a claim of the shared queue ended.

        If Redis is lost, the pairs of the claim for which requests still wait go to the local queue instead.
        """
        if not self._is_redis_lost:
            try:
                await report
            except StoreError as error:
                await self.fail_over(error)
            else:
                return
        report.close()
        for pair, context in self._shared.abandon_claim(claim):
            self._local.adopt(pair, context)
        self._changed.set()
