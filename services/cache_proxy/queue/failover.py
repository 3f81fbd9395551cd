"""The queue that callers see: the one in Redis while that can be reached, else a local one."""

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
from services.cache_proxy.queue.interface import Claim, ClaimDeferred, EnqueueResult, RequestContext
from services.cache_proxy.queue.local.local_queue import LocalQueue
from services.cache_proxy.queue.outage import MIN_BACKOFF_SECONDS
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.snapshot import QueueSnapshot
from services.cache_proxy.queue.time_slots import Membership, TimeSlotLimiter

_log = logging.getLogger(__name__)

_SILENCE_GRACE_SECONDS = (
    1.2  # after its last word, those who still have Redis leave the moments of a replica alone
)
_PAUSE_DETECTION_SECONDS = 2.5  # nobody who runs takes so long to find Redis lost
_MAX_UNPUBLISHED_OUTCOMES = 200_000
_DAMAGED_ADVICE = "a key of the queue is damaged, and making the queue anew did not mend it"
_PUBLISH_CHUNK_PAIRS = 500


class FailoverQueue:
    """State: `_lost`, `_heard_at`, `_local_claims` (to know whose a claim is), `_unpublished`.

    `_heard_at` is when Redis last heard of this replica; `_unpublished` is what Redis was not told.
    `shared` always knows all that somebody here waits for. While Redis is lost the same pairs wait in `local`
    too; when it is back, those that are not in flight are taken out there and asked again here. What ends in
    `local` ends in `shared` (its `settle` is `shared.end`), so nothing that ended is asked again.
    """

    def __init__(self, *, shared: RedisQueue, local: LocalQueue, limiter: TimeSlotLimiter) -> None:
        self._shared = shared
        self._local = local
        self._limiter = limiter
        self._is_redis_lost = False
        self._last_heartbeat_at = -math.inf
        self._local_claims: set[Claim] = set()
        self._unpublished_outcomes: dict[bytes, Outcome] = {}
        self._changed = asyncio.Event()
        self._access_granted = asyncio.Event()
        self._access_granted.set()
        self.blocking_error: StoreError | None = None
        """Why this replica may not use Redis though Redis answers; None while it may."""
        self.last_loss: tuple[str, float] | None = None
        """Why Redis was lost, and when, on time.monotonic."""
        self._other_format: int | None = None

    @property
    def is_redis_lost(self) -> bool:
        """Whether Redis is lost."""
        return self._is_redis_lost

    @property
    def stands_by(self) -> bool:
        """Whether the shared queue is used by replicas of another queue format."""
        return self._other_format is not None

    async def wait_for_access(self) -> None:
        """See `ProxyQueue.admitted`."""
        await self._access_granted.wait()

    def on_access_granted(self) -> None:
        """Redis refuses this replica nothing of what it needs."""
        if self.blocking_error is not None:
            self.blocking_error = None
            _log.info("Redis refuses this replica nothing any more")
        self._access_granted.set()

    @property
    def store_before_complete(self) -> bool:
        """See `Queue.answers_live_elsewhere`."""
        return self._shared.store_before_complete

    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        """See `Queue.enqueue`."""
        if not self._is_redis_lost:
            try:
                return await self._shared.enqueue(pairs, context)
            except StoreError as error:
                await self.fail_over(error)
        added = self._shared.register_interest(pairs, context)
        enqueued = await self._local.enqueue(pairs, context)
        self._shared.add_requester(pairs, context)
        self._shared.apply_known_outcomes(enqueued.outcomes, new_digests=added)
        return enqueued

    async def cancel(self, digests: Sequence[bytes]) -> None:
        """See `Queue.leave`."""
        await self._local.cancel(digests)
        try:
            await self._shared.cancel(digests, notify_redis=not self._is_redis_lost)
        except StoreError as error:
            await self.fail_over(error)

    async def claim(self) -> Claim | ClaimDeferred:
        """See `Queue.claim`."""
        if not self._is_redis_lost:
            try:
                return await self._shared.claim()
            except StoreError as error:
                await self.fail_over(error)
        decision = await self._local.claim()
        if isinstance(decision, Claim):
            self._local_claims.add(decision)
        return decision

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        if claim in self._local_claims:
            return await self._local.postpone_slot(claim, seconds=seconds)
        if not self._is_redis_lost:
            try:
                return await self._shared.postpone_slot(claim, seconds=seconds)
            except StoreError as error:
                await self.fail_over(error)
        return False

    async def release(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        if claim in self._local_claims:
            await self._local.release(claim)
            await self._after_local_claim(claim)
        else:
            await self._after_shared_claim(claim, self._shared.release(claim))

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """See `Queue.fulfil`. Whatever became of Redis meanwhile, whoever waits here is answered."""
        if claim in self._local_claims:
            await self._local.complete(claim, outcomes, inferred=inferred)
            if not self._local.has_unfinished_pairs(
                claim
            ):  # a part may have ended before: found in the cache, say
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
        self._shared.complete_locally(claim, outcomes)
        self._unpublished_outcomes.update(outcomes)
        while len(self._unpublished_outcomes) > _MAX_UNPUBLISHED_OUTCOMES:
            del self._unpublished_outcomes[next(iter(self._unpublished_outcomes))]

    async def fail(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None = None,
        model_fault: bool = False,
        unsent: bool = False,
    ) -> None:
        """See `Queue.fail`."""
        if claim in self._local_claims:
            await self._local.fail(
                claim, error, retry_after_seconds=retry_after_seconds, model_fault=model_fault, unsent=unsent
            )
            await self._after_local_claim(claim)
        else:
            backoff_seconds = MIN_BACKOFF_SECONDS if retry_after_seconds is None else retry_after_seconds
            self._limiter.block_until(time.monotonic() + backoff_seconds)  # whichever queue is next
            telling = self._shared.fail(
                claim, error, retry_after_seconds=retry_after_seconds, model_fault=model_fault, unsent=unsent
            )
            await self._after_shared_claim(claim, telling)

    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        """See `Queue.refuse`."""
        if claim in self._local_claims:
            await self._local.reject(claim, error, errors_by_digest)
            await self._after_local_claim(claim)
        else:
            await self._after_shared_claim(claim, self._shared.reject(claim, error, errors_by_digest))

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:
        """See `ProxyQueue.overview`. Who only looks on does not decide that Redis is lost."""
        if self._is_redis_lost:
            return await self._local.snapshot(minutes=minutes)
        return await self._shared.snapshot(minutes=minutes)

    async def wait_for_change(self) -> None:
        """See `Queue.changed`."""
        events = (self._shared.wait_for_change(), self._local.wait_for_change(), self._changed.wait())
        waits: list[asyncio.Future[object]] = [asyncio.ensure_future(event) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._changed.clear()
            for wait in waits:
                wait.cancel()

    def discard(self, digest: bytes) -> None:
        """See `ProxyQueue.discard`. The others are not told of it either."""
        self._local.discard(digest)
        self._unpublished_outcomes.pop(digest, None)

    def discard_all(self) -> None:
        """See `ProxyQueue.discard_all`."""
        self._local.discard_all()
        self._unpublished_outcomes.clear()

    def fail_all(self, error: PairError) -> None:
        """See `LocalQueue.end_all`."""
        self._local.fail_all(error)
        self._shared.fail_all(error)

    def show_local_metrics(self) -> None:
        """See `LocalQueue.show_alone`."""
        self._local.show_local_metrics()

    def on_heartbeat(self, membership: Membership, *, received_after: float) -> None:
        """Redis answered a heartbeat that it got at this time or later."""
        self._limiter.update_membership(membership)
        self._last_heartbeat_at = received_after
        self._limiter.not_before = received_after + _SILENCE_GRACE_SECONDS

    async def fail_over(self, error: StoreError) -> None:
        """Redis is lost: what waits here waits in the local queue from now on."""
        self._record_blocking_error(error)
        self._note_format(error)
        if self._is_redis_lost:
            return
        self._is_redis_lost = True
        self.last_loss = (error.kind, time.monotonic())
        if self.blocking_error is None and not self.stands_by:
            _log.warning("the shared queue is lost, going on alone: %s", error)
        self._local.reset_quotas()
        now = time.monotonic()
        if (
            now - self._last_heartbeat_at > _PAUSE_DETECTION_SECONDS
        ):  # it was paused: the others may be using its moments
            self._limiter.not_before = now + _SILENCE_GRACE_SECONDS
        self._activate_local()

    def _record_blocking_error(self, error: StoreError) -> None:
        """Log once what Redis refuses. A replica that was ready before stays ready."""
        if not isinstance(error, StoreAccessDeniedError | StoreDamagedError):
            return
        if self.blocking_error is None or str(self.blocking_error) != str(error):
            advice = (
                "see deploy/redis/users.acl" if isinstance(error, StoreAccessDeniedError) else _DAMAGED_ADVICE
            )
            _log.error("this replica leaves the shared queue until that is mended: %s (%s)", error, advice)
        self.blocking_error = error
        if not math.isfinite(self._last_heartbeat_at):
            self._access_granted.clear()

    def _note_format(self, error: StoreError) -> None:
        """Log once that the shared queue has another format, and call the model as a silent member does."""
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

    def stand_by(self, membership: Membership, *, begins_at: float) -> None:
        """Use these moments, not before `begins_at`, on time.monotonic."""
        self._limiter.not_before = begins_at
        if self._limiter.stand_by(membership):
            self._changed.set()

    def _activate_local(self) -> None:
        for pair, asker in self._shared.unclaimed_pairs():
            self._local.adopt(pair, asker)
        self._changed.set()

    async def fail_back(self) -> None:
        """Redis is back: what waits and is not in flight waits there again. Raises `StoreError`.

        What comes meanwhile still waits in the local queue; so there is a second, short round, after which
        nothing can. It is also of what was left and asked again meanwhile, and of what others joined.
        """
        while self._unpublished_outcomes:
            some = dict(itertools.islice(self._unpublished_outcomes.items(), _PUBLISH_CHUNK_PAIRS))
            await self._shared.publish(some)
            for digest, outcome in some.items():
                if self._unpublished_outcomes.get(digest) is outcome:
                    del self._unpublished_outcomes[digest]
        noted = self._shared.snapshot_waiting()
        try:
            await self._shared.re_enqueue(exclude=self._local.remove_waiting())
        except StoreError:
            self._activate_local()
            raise
        self._is_redis_lost = False
        self._other_format = None
        _log.info("the shared queue is back")
        self._changed.set()
        try:
            await self._shared.re_enqueue(
                exclude=self._shared.unchanged_since(noted) | self._local.remove_waiting()
            )
        except StoreError as error:
            await self.fail_over(error)

    async def _after_local_claim(self, claim: Claim) -> None:
        self._local_claims.discard(claim)
        if not self._is_redis_lost:  # Redis came back meanwhile: what was not answered waits there
            try:
                await self._shared.re_enqueue(exclude=self._local.remove_waiting())
            except StoreError as error:
                await self.fail_over(error)

    async def _after_shared_claim(self, claim: Claim, report: Coroutine[None, None, None]) -> None:
        if not self._is_redis_lost:
            try:
                await report
            except StoreError as error:
                await self.fail_over(error)
            else:
                return
        report.close()
        for pair, asker in self._shared.abandon_claim(claim):
            self._local.adopt(pair, asker)
        self._changed.set()
