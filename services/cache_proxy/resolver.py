"""The read path: L1, then L2, then the queue for the model."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from services.cache_proxy import fast_path
from services.cache_proxy.cache.entry import FreshnessPolicy, entry_level, pack_entry
from services.cache_proxy.cache.key import BatchDigester
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import (
    DeadlineExceededError,
    ModelUnavailableError,
    PairError,
    PairsFailedError,
)
from services.cache_proxy.observability.rpc_metrics import outcome_kind
from services.cache_proxy.queue.interface import Queue, RequestContext
from services.cache_proxy.queue.waiters import WaiterRegistry
from services.cache_proxy.refresher import Refresher
from services.cache_proxy.wire.request_parser import CHUNK_BYTES, CHUNK_PAIRS, PairColumns
from services.common.checkpoint import checkpoint, iter_chunks
from services.common.tracing import OFF, Tracing

_LOOKUP_CHUNK_PAIRS = 4000
"""Of a large request at once: what the store of a Cluster takes together. It is under 1 ms of work."""

_IndicesByDigest = dict[bytes, list[int]]


class ResolveResult:
    """How many pairs a request has, and how many of them had which outcome; the others failed.

    `levels` are of those that L1 did not know, by their place in `Asked`: 0 where there is none.
    """

    __slots__ = ("_outcomes", "levels", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.levels: list[int] = []
        self._outcomes: dict[str, int] = {}

    def record(self, outcome: str, pairs: int) -> None:
        """Note that so many pairs had this outcome."""
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + pairs

    def outcome_counts(self) -> dict[str, int]:
        """How many pairs had which outcome."""
        return {"failed": self.size - sum(self._outcomes.values()), **self._outcomes}

    @property
    def hits(self) -> int:
        """How many pairs a cache answered."""
        return sum(count for outcome, count in self._outcomes.items() if outcome_kind(outcome) == "hit")


class Resolver:
    """Answers a request's pairs, or says of each why not."""

    def __init__(
        self,
        *,
        digest_batch: BatchDigester,
        l1: L1Cache,
        store: ResilientStore,
        queue: Queue,
        waiters: WaiterRegistry,
        freshness: FreshnessPolicy,
        clock: StoreClock,
        tracing: Tracing = OFF,
    ) -> None:
        self._digest_batch = digest_batch
        self._l1 = l1
        self._store = store
        self._queue = queue
        self._waiters = waiters
        self._freshness = freshness
        self._clock = clock
        self._tracing = tracing
        self._refresher = Refresher(queue=queue, waiters=waiters)

    async def close(self) -> None:
        """Wait for no refresh any more."""
        await self._refresher.close()

    def answer_one(self, message: bytes) -> bytes | None:
        """The answer to a whole request, if that is one pair which L1 knows."""
        self._l1.expire(self._clock.today())
        return fast_path.answer_single(message, self._l1)

    async def answer_known(self, items: Sequence[bytes]) -> tuple[list[bytes], Sequence[int]]:
        """What L1 knows of a request's items: their answers, and the positions of those without one."""
        if not self._l1.enabled:
            return [b""] * len(items), range(len(items))
        self._l1.expire(self._clock.today())
        return await fast_path.answer_batch(items, self._l1)

    async def resolve(self, columns: PairColumns, context: RequestContext, result: ResolveResult) -> None:
        """Fill `answers` for every pair that L1 did not know, also when it raises: then with what is known.

        Raises `PairsFailedError` when every pair has ended but some without a level, `QueueFullError` and
        `DeadlineExceededError` when pairs could not, or not in time, be asked.
        """
        epoch = self._l1.epoch  # before any look-up: what is invalidated from now on must not come back
        digests: list[bytes] = []
        async for some in iter_chunks(columns.items, CHUNK_PAIRS, size=len, max_size=CHUNK_BYTES):
            first, last = len(digests), len(digests) + len(some)
            digests += self._digest_batch(columns.texts[2 * first : 2 * last])
        missing: _IndicesByDigest = {}
        async for few in iter_chunks(digests, _LOOKUP_CHUNK_PAIRS):
            await self._lookup_l2(few, columns, epoch, result, missing)
        if missing:
            await self._enqueue_and_wait(missing, columns, epoch, context, result)

    async def _lookup_l2(
        self,
        digests: Sequence[bytes],
        columns: PairColumns,
        epoch: int,
        result: ResolveResult,
        missing_indices: _IndicesByDigest,
    ) -> None:
        """Answer what L2 knows of the next places; what is stale is asked again behind."""
        with self._tracing.span("store.look_up", pairs=len(digests)) as span:
            first, entries = len(result.levels), await self._lookup_distinct(digests)
            span.set_attributes(found=len(entries) - entries.count(0))
        day, counts = self._clock.today(), Counter(entries)  # few different ones: each is judged once
        fresh = {entry for entry in counts if self._freshness.is_fresh(entry, day=day)}
        levels = {entry: entry_level(entry) for entry in counts}
        result.levels += [levels[entry] for entry in entries]
        for entry in levels.keys() - {0}:
            result.record("l2" if entry in fresh else "stale", counts[entry])
        if len(fresh) < len(counts):
            stale: dict[bytes, Pair] = {}
            for place, (digest, entry) in enumerate(zip(digests, entries, strict=True), first):
                if not entry:
                    missing_indices.setdefault(digest, []).append(place)
                elif entry not in fresh and digest not in stale:
                    stale[digest] = columns.pair(place, digest)
            self._refresher.schedule(list(stale.values()))
        if self._l1.enabled and fresh:
            last = first + len(digests)
            looked_up = zip(range(first, last), digests, entries, strict=True)
            items = columns.items[first:last]
            async for some in iter_chunks(items, CHUNK_PAIRS, size=len, max_size=CHUNK_BYTES):
                for place, digest, entry in islice(looked_up, len(some)):
                    if entry in fresh:
                        self._cache_in_l1(digest, entry, columns.l1_key(place), epoch)

    async def _lookup_distinct(self, digests: Sequence[bytes]) -> Sequence[int]:
        """What L2 knows of each, by position; what is there twice is looked up once."""
        distinct = set(digests)
        if len(distinct) == len(digests):
            return await self._store.get_entries(digests)
        once = list(distinct)
        entries = dict(zip(once, await self._store.get_entries(once), strict=True))
        return [entries[digest] for digest in digests]

    async def _enqueue_and_wait(
        self,
        indices_by_digest: _IndicesByDigest,
        columns: PairColumns,
        epoch: int,
        context: RequestContext,
        result: ResolveResult,
    ) -> None:
        is_long = (
            len(indices_by_digest) > _LOOKUP_CHUNK_PAIRS
        )  # then what is done at one go here is tenths of a second
        if is_long:
            await checkpoint()
        pairs = [columns.pair(some[0], digest) for digest, some in indices_by_digest.items()]
        queued: frozenset[bytes] = frozenset()
        started_at = asyncio.get_running_loop().time()
        wait = self._waiters.register(list(indices_by_digest), deadline=context.deadline)
        try:
            with self._tracing.span("queue.wait", pairs=len(pairs), priority=context.priority) as span:
                async with asyncio.timeout_at(context.deadline):
                    enqueued = await self._queue.enqueue(pairs, context)
                    queued = enqueued.queued
                    span.set_attributes(
                        queued=len(queued), joined=len(pairs) - len(queued) - len(enqueued.outcomes)
                    )
                    self._waiters.resolve_one(wait, enqueued.outcomes.items())
                    await wait.wait()
                    if is_long:  # one call of the model ends the waits of many
                        await checkpoint()
        except ModelUnavailableError as error:  # nothing of it was queued
            self._waiters.fail_waiter(wait, error)
        except TimeoutError:
            waited_seconds = asyncio.get_running_loop().time() - started_at
            raise DeadlineExceededError(waited_seconds) from None
        finally:
            self._record_outcomes(wait.outcomes, indices_by_digest, columns, epoch, queued, result)
            await self._queue.cancel(self._waiters.unregister(wait))
        failures = {
            columns.positions[place]: outcome.redacted_for(context.request_id)
            for digest, outcome in wait.outcomes.items()
            if isinstance(outcome, PairError)
            for place in indices_by_digest[digest]
        }
        if failures:
            raise PairsFailedError(failures)

    def _record_outcomes(
        self,
        outcomes: dict[bytes, Outcome],
        indices_by_digest: _IndicesByDigest,
        columns: PairColumns,
        epoch: int,
        queued: frozenset[bytes],
        result: ResolveResult,
    ) -> None:
        """Note the levels: the first place of a pair that this request queued was `inferred` for it."""
        day = self._clock.today()
        for digest, level in outcomes.items():
            if isinstance(level, int):
                inferred = digest in queued
                result.record("inferred", inferred)
                result.record("coalesced", len(indices_by_digest[digest]) - inferred)
                for place in indices_by_digest[digest]:
                    result.levels[place] = level
                    self._cache_in_l1(digest, pack_entry(level, day), columns.l1_key(place), epoch)

    def _cache_in_l1(self, digest: bytes, entry: int, key: bytes, epoch: int) -> None:
        expires_day = self._freshness.expiry_day(entry)
        self._l1.put(key, entry_level(entry), digest=digest, epoch=epoch, expiry_day=expires_day)
