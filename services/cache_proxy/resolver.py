"""The read path: the in-process cache (L1), then the shared store (L2), then the queue for the model."""

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

# What the store of a Redis Cluster takes in one call. It is under 1 ms of work on the event loop.
_LOOKUP_CHUNK_PAIRS = 4000

_IndicesByDigest = dict[bytes, list[int]]


class ResolveResult:
    """The levels of one request, and how many of its pairs had which outcome.

    `size` is the number of pairs of the request. `levels` are those of the pairs that L1 did not know, by
    their index in `PairColumns`; 0 where there is no level. A pair without a recorded outcome has failed.
    """

    __slots__ = ("_outcomes", "levels", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.levels: list[int] = []
        self._outcomes: dict[str, int] = {}

    def record(self, outcome: str, pairs: int) -> None:
        """Add a number of pairs to an outcome."""
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + pairs

    def outcome_counts(self) -> dict[str, int]:
        """Return the number of pairs by outcome."""
        return {"failed": self.size - sum(self._outcomes.values()), **self._outcomes}

    @property
    def hits(self) -> int:
        """Return the number of pairs that a cache answered."""
        return sum(count for outcome, count in self._outcomes.items() if outcome_kind(outcome) == "hit")


class Resolver:
    """Finds the levels of a request's pairs, or for each pair the reason why it has none."""

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
        """Cancel all background refreshes."""
        await self._refresher.close()

    def answer_one(self, message: bytes) -> bytes | None:
        """Return the response to a whole request if that is one pair which L1 knows, else None."""
        self._l1.expire(self._clock.today())
        return fast_path.answer_single(message, self._l1)

    async def answer_known(self, items: Sequence[bytes]) -> tuple[list[bytes], Sequence[int]]:
        """Answer from L1 what it knows of a request's items.

        Return a response for each item, empty where L1 has none, and the indices of those without one.
        """
        if not self._l1.enabled:
            return [b""] * len(items), range(len(items))
        self._l1.expire(self._clock.today())
        return await fast_path.answer_batch(items, self._l1)

    async def resolve(self, columns: PairColumns, context: RequestContext, result: ResolveResult) -> None:
        """Fill `result` for every pair that L1 did not know.

        When it raises, `result` has what is known by then. Raises `PairsFailedError` when every pair has
        ended but some without a level, `QueueFullError` when the pairs cannot be queued, and
        `DeadlineExceededError` when they were not answered in time.
        """
        # The epoch is read before any lookup, so that an answer invalidated from now on does not enter L1.
        epoch = self._l1.epoch

        # Hash and look up in chunks, so that a large request does not block the event loop.
        digests: list[bytes] = []
        async for chunk in iter_chunks(columns.items, CHUNK_PAIRS, size=len, max_size=CHUNK_BYTES):
            first = len(digests)
            last = first + len(chunk)
            digests += self._digest_batch(columns.texts[2 * first : 2 * last])
        missing_indices: _IndicesByDigest = {}
        async for digest_chunk in iter_chunks(digests, _LOOKUP_CHUNK_PAIRS):
            await self._lookup_l2(digest_chunk, columns, epoch, result, missing_indices)
        if missing_indices:
            await self._enqueue_and_wait(missing_indices, columns, epoch, context, result)

    async def _lookup_l2(
        self,
        digests: Sequence[bytes],
        columns: PairColumns,
        epoch: int,
        result: ResolveResult,
        missing_indices: _IndicesByDigest,
    ) -> None:
        """Answer what L2 knows of the next chunk, and schedule a refresh of its stale answers."""
        with self._tracing.span("store.look_up", pairs=len(digests)) as span:
            first = len(result.levels)
            entries = await self._lookup_distinct(digests)
            span.set_attributes(found=len(entries) - entries.count(0))

        # An entry is a level and a day, so a chunk has few distinct ones: each is judged once.
        day = self._clock.today()
        counts = Counter(entries)
        fresh = {entry for entry in counts if self._freshness.is_fresh(entry, day=day)}
        levels = {entry: entry_level(entry) for entry in counts}
        result.levels += [levels[entry] for entry in entries]
        for entry in levels.keys() - {0}:
            result.record("l2" if entry in fresh else "stale", counts[entry])

        # Collect misses for the queue and stale answers for the refresher.
        if len(fresh) < len(counts):
            stale: dict[bytes, Pair] = {}
            for index, (digest, entry) in enumerate(zip(digests, entries, strict=True), first):
                if not entry:
                    missing_indices.setdefault(digest, []).append(index)
                elif entry not in fresh and digest not in stale:
                    stale[digest] = columns.pair(index, digest)
            self._refresher.schedule(list(stale.values()))

        # Copy fresh answers to L1.
        if self._l1.enabled and fresh:
            last = first + len(digests)
            looked_up = zip(range(first, last), digests, entries, strict=True)
            items = columns.items[first:last]
            async for chunk in iter_chunks(items, CHUNK_PAIRS, size=len, max_size=CHUNK_BYTES):
                for index, digest, entry in islice(looked_up, len(chunk)):
                    if entry in fresh:
                        self._cache_in_l1(digest, entry, columns.l1_key(index), epoch)

    async def _lookup_distinct(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Return the entries of L2 by position. A digest that occurs twice is looked up once."""
        distinct = set(digests)
        if len(distinct) == len(digests):
            return await self._store.get_entries(digests)
        ordered = list(distinct)
        entries = dict(zip(ordered, await self._store.get_entries(ordered), strict=True))
        return [entries[digest] for digest in digests]

    async def _enqueue_and_wait(
        self,
        indices_by_digest: _IndicesByDigest,
        columns: PairColumns,
        epoch: int,
        context: RequestContext,
        result: ResolveResult,
    ) -> None:
        """Queue the missing pairs for the model, and wait until each has an outcome."""
        # Each of the steps below takes tenths of a second for a large request: let other tasks run between.
        is_large = len(indices_by_digest) > _LOOKUP_CHUNK_PAIRS
        if is_large:
            await checkpoint()
        pairs = [columns.pair(indices[0], digest) for digest, indices in indices_by_digest.items()]
        queued: frozenset[bytes] = frozenset()
        started_at = asyncio.get_running_loop().time()

        # The waiter is registered before the pairs are enqueued: an outcome that is published meanwhile
        # finds it.
        waiter = self._waiters.register(list(indices_by_digest), deadline=context.deadline)
        try:
            with self._tracing.span("queue.wait", pairs=len(pairs), priority=context.priority) as span:
                async with asyncio.timeout_at(context.deadline):
                    enqueued = await self._queue.enqueue(pairs, context)
                    queued = enqueued.queued
                    span.set_attributes(
                        queued=len(queued), joined=len(pairs) - len(queued) - len(enqueued.outcomes)
                    )
                    self._waiters.resolve_one(waiter, enqueued.outcomes.items())
                    await waiter.wait()
                    # One call of the model resolves many waiters at once.
                    if is_large:
                        await checkpoint()
        except ModelUnavailableError as error:
            # Nothing was queued.
            self._waiters.fail_waiter(waiter, error)
        except TimeoutError:
            waited_seconds = asyncio.get_running_loop().time() - started_at
            raise DeadlineExceededError(waited_seconds) from None
        finally:
            # Also after an error: levels that arrived are kept, and pairs without an outcome are cancelled
            # unless another request of this replica waits for them.
            self._record_outcomes(waiter.outcomes, indices_by_digest, columns, epoch, queued, result)
            await self._queue.cancel(self._waiters.unregister(waiter))
        failures = {
            columns.positions[index]: outcome.redacted_for(context.request_id)
            for digest, outcome in waiter.outcomes.items()
            if isinstance(outcome, PairError)
            for index in indices_by_digest[digest]
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
        """Add the model's levels to the result and to L1.

        If this request queued a pair, the pair's first occurrence counts as `inferred` and its repetitions
        as `coalesced`. If another request had queued it, all occurrences are `coalesced`.
        """
        day = self._clock.today()
        for digest, level in outcomes.items():
            if isinstance(level, int):
                inferred = digest in queued
                result.record("inferred", inferred)
                result.record("coalesced", len(indices_by_digest[digest]) - inferred)
                for index in indices_by_digest[digest]:
                    result.levels[index] = level
                    self._cache_in_l1(digest, pack_entry(level, day), columns.l1_key(index), epoch)

    def _cache_in_l1(self, digest: bytes, entry: int, key: bytes, epoch: int) -> None:
        expiry_day = self._freshness.expiry_day(entry)
        self._l1.put(key, entry_level(entry), digest=digest, epoch=epoch, expiry_day=expiry_day)
