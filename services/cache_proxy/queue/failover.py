"""The queue that callers see: the one in Redis while that can be reached, else a local one."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Coroutine, Mapping, Sequence

from services.cache_proxy.errors import (
    AccessRefusedByStore,
    PairError,
    QueueFormatError,
    StoreDamaged,
    StoreError,
    Unavailable,
)
from services.cache_proxy.queue.interface import Asker, Claim, Enqueued, NotYet, Outcome, Pair
from services.cache_proxy.queue.local.local_queue import LocalQueue
from services.cache_proxy.queue.outage import MIN_BACKOFF_SECONDS
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.snapshot import Overview
from services.cache_proxy.queue.time_slots import Membership, SlotLimiter

_log = logging.getLogger(__name__)

_QUIET_SECONDS = 1.2  # after its last word, those who still have Redis leave the moments of a replica alone
_PAUSE_SECONDS = 2.5  # nobody who runs takes so long to find Redis lost
_MAX_UNPUBLISHED = 200_000
_DAMAGED = "a key of the queue is damaged, and making the queue anew did not mend it"
_AT_ONCE = 500


class FailoverQueue:
    """State: `_lost`, `_heard_at`, `_local_claims` (to know whose a claim is), `_unpublished`.

    `_heard_at` is when Redis last heard of this replica; `_unpublished` is what Redis was not told.
    `shared` always knows all that somebody here waits for. While Redis is lost the same pairs wait in `local`
    too; when it is back, those that are not in flight are taken out there and asked again here. What ends in
    `local` ends in `shared` (its `settle` is `shared.end`), so nothing that ended is asked again.
    """

    def __init__(self, *, shared: RedisQueue, local: LocalQueue, limiter: SlotLimiter) -> None:
        self._shared = shared
        self._local = local
        self._limiter = limiter
        self._lost = False
        self._heard_at = -math.inf
        self._local_claims: set[Claim] = set()
        self._unpublished: dict[bytes, Outcome] = {}
        self._changed = asyncio.Event()
        self._admitted = asyncio.Event()
        self._admitted.set()
        self.refusal: StoreError | None = None
        """Why this replica may not use Redis though Redis answers; None while it may."""
        self.last_loss: tuple[str, float] | None = None
        """Why Redis was lost, and when, on time.monotonic."""
        self._other_format: int | None = None

    @property
    def lost(self) -> bool:
        """Whether Redis is lost."""
        return self._lost

    @property
    def stands_by(self) -> bool:
        """Whether the shared queue is used by replicas of another queue format."""
        return self._other_format is not None

    async def admitted(self) -> None:
        """See `ProxyQueue.admitted`."""
        await self._admitted.wait()

    def admit(self) -> None:
        """Redis refuses this replica nothing of what it needs."""
        if self.refusal is not None:
            self.refusal = None
            _log.info("Redis refuses this replica nothing any more")
        self._admitted.set()

    @property
    def answers_live_elsewhere(self) -> bool:
        """See `Queue.answers_live_elsewhere`."""
        return self._shared.answers_live_elsewhere

    async def enqueue(self, pairs: Sequence[Pair], asker: Asker) -> Enqueued:
        """See `Queue.enqueue`."""
        if not self._lost:
            try:
                return await self._shared.enqueue(pairs, asker)
            except StoreError as error:
                await self.lose(error)
        added = self._shared.note(pairs, asker)
        enqueued = await self._local.enqueue(pairs, asker)
        self._shared.join(pairs, asker)
        self._shared.learn(enqueued.ended, new=added)
        return enqueued

    async def leave(self, digests: Sequence[bytes]) -> None:
        """See `Queue.leave`."""
        await self._local.leave(digests)
        try:
            await self._shared.leave(digests, tell=not self._lost)
        except StoreError as error:
            await self.lose(error)

    async def claim(self) -> Claim | NotYet:
        """See `Queue.claim`."""
        if not self._lost:
            try:
                return await self._shared.claim()
            except StoreError as error:
                await self.lose(error)
        decision = await self._local.claim()
        if isinstance(decision, Claim):
            self._local_claims.add(decision)
        return decision

    async def late(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        if claim in self._local_claims:
            return await self._local.late(claim, seconds=seconds)
        if not self._lost:
            try:
                return await self._shared.late(claim, seconds=seconds)
            except StoreError as error:
                await self.lose(error)
        return False

    async def put_back(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        if claim in self._local_claims:
            await self._local.put_back(claim)
            await self._local_is_over(claim)
        else:
            await self._shared_is_over(claim, self._shared.put_back(claim))

    async def fulfil(self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True) -> None:
        """See `Queue.fulfil`. Whatever became of Redis meanwhile, whoever waits here is answered."""
        if claim in self._local_claims:
            await self._local.fulfil(claim, outcomes, inferred=inferred)
            if not self._local.holds(claim):  # a part may have ended before: found in the cache, say
                self._local_claims.discard(claim)
        else:
            self._local.end_elsewhere(outcomes)
        if not self._lost:
            try:
                await self._shared.fulfil(claim, outcomes, inferred=inferred)
            except StoreError as error:
                await self.lose(error)
            else:
                return
        self._shared.ended_alone(claim, outcomes)
        self._unpublished.update(outcomes)
        while len(self._unpublished) > _MAX_UNPUBLISHED:
            del self._unpublished[next(iter(self._unpublished))]

    async def fail(
        self, claim: Claim, error: Unavailable, *, retry_after_seconds: float | None = None,
        suspicious: bool = False, unsent: bool = False,
    ) -> None:  # fmt: skip
        """See `Queue.fail`."""
        if claim in self._local_claims:
            await self._local.fail(
                claim, error, retry_after_seconds=retry_after_seconds, suspicious=suspicious, unsent=unsent
            )
            await self._local_is_over(claim)
        else:
            backoff_seconds = MIN_BACKOFF_SECONDS if retry_after_seconds is None else retry_after_seconds
            self._limiter.hold_until(time.monotonic() + backoff_seconds)  # whichever queue is next
            telling = self._shared.fail(
                claim, error, retry_after_seconds=retry_after_seconds, suspicious=suspicious, unsent=unsent
            )
            await self._shared_is_over(claim, telling)

    async def refuse(self, claim: Claim, error: PairError, named: Mapping[bytes, PairError]) -> None:
        """See `Queue.refuse`."""
        if claim in self._local_claims:
            await self._local.refuse(claim, error, named)
            await self._local_is_over(claim)
        else:
            await self._shared_is_over(claim, self._shared.refuse(claim, error, named))

    async def overview(self, *, minutes: int) -> Overview:
        """See `ProxyQueue.overview`. Who only looks on does not decide that Redis is lost."""
        if self._lost:
            return await self._local.overview(minutes=minutes)
        return await self._shared.overview(minutes=minutes)

    async def changed(self) -> None:
        """See `Queue.changed`."""
        events = (self._shared.changed(), self._local.changed(), self._changed.wait())
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
        self._unpublished.pop(digest, None)

    def discard_all(self) -> None:
        """See `ProxyQueue.discard_all`."""
        self._local.discard_all()
        self._unpublished.clear()

    def end_all(self, error: PairError) -> None:
        """See `LocalQueue.end_all`."""
        self._local.end_all(error)
        self._shared.end_all(error)

    def show_alone(self) -> None:
        """See `LocalQueue.show_alone`."""
        self._local.show_alone()

    def heard(self, membership: Membership, *, at: float) -> None:
        """Redis answered a heartbeat that it got at this time or later."""
        self._limiter.know(membership)
        self._heard_at = at
        self._limiter.begins_at = at + _QUIET_SECONDS

    async def lose(self, error: StoreError) -> None:
        """Redis is lost: what waits here waits in the local queue from now on."""
        self._note_refusal(error)
        self._note_format(error)
        if self._lost:
            return
        self._lost = True
        self.last_loss = (error.kind, time.monotonic())
        if self.refusal is None and not self.stands_by:
            _log.warning("the shared queue is lost, going on alone: %s", error)
        self._local.begin_quotas()
        now = time.monotonic()
        if now - self._heard_at > _PAUSE_SECONDS:  # it was paused: the others may be using its moments
            self._limiter.begins_at = now + _QUIET_SECONDS
        self._go_on_alone()

    def _note_refusal(self, error: StoreError) -> None:
        """Log once what Redis refuses. A replica that was ready before stays ready."""
        if not isinstance(error, AccessRefusedByStore | StoreDamaged):
            return
        if self.refusal is None or str(self.refusal) != str(error):
            advice = "see deploy/redis/users.acl" if isinstance(error, AccessRefusedByStore) else _DAMAGED
            _log.error("this replica leaves the shared queue until that is mended: %s (%s)", error, advice)
        self.refusal = error
        if not math.isfinite(self._heard_at):
            self._admitted.clear()

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
        self._limiter.begins_at = begins_at
        if self._limiter.stand_by(membership):
            self._changed.set()

    def _go_on_alone(self) -> None:
        for pair, asker in self._shared.waiting():
            self._local.take_over(pair, asker)
        self._changed.set()

    async def regain(self) -> None:
        """Redis is back: what waits and is not in flight waits there again. Raises `StoreError`.

        What comes meanwhile still waits in the local queue; so there is a second, short round, after which
        nothing can. It is also of what was left and asked again meanwhile, and of what others joined.
        """
        while self._unpublished:
            some = dict(itertools.islice(self._unpublished.items(), _AT_ONCE))
            await self._shared.publish(some)
            for digest, outcome in some.items():
                if self._unpublished.get(digest) is outcome:
                    del self._unpublished[digest]
        noted = self._shared.noted()
        try:
            await self._shared.ask_again(but=self._local.withdraw())
        except StoreError:
            self._go_on_alone()
            raise
        self._lost = False
        self._other_format = None
        _log.info("the shared queue is back")
        self._changed.set()
        try:
            await self._shared.ask_again(but=self._shared.unchanged(noted) | self._local.withdraw())
        except StoreError as error:
            await self.lose(error)

    async def _local_is_over(self, claim: Claim) -> None:
        self._local_claims.discard(claim)
        if not self._lost:  # Redis came back meanwhile: what was not answered waits there
            try:
                await self._shared.ask_again(but=self._local.withdraw())
            except StoreError as error:
                await self.lose(error)

    async def _shared_is_over(self, claim: Claim, telling: Coroutine[None, None, None]) -> None:
        if not self._lost:
            try:
                await telling
            except StoreError as error:
                await self.lose(error)
            else:
                return
        telling.close()
        for pair, asker in self._shared.release(claim):
            self._local.take_over(pair, asker)
        self._changed.set()
