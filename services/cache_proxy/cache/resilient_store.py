"""A store that never raises: while it is down it knows nothing, and what it missed is written later."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextvars import Context

from services.cache_proxy.cache.entry import FreshnessPolicy, entry_level, pack_entry
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.store import AnswerStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.domain import DIGEST_BYTES
from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.common.tasks import cancel_and_wait

_log = logging.getLogger(__name__)

_PROBE_INTERVAL_SECONDS = 1.0
_PROBE_DIGEST = bytes(DIGEST_BYTES)
_MAX_PENDING_PAIRS = 1_000_000  # about 200 MB, and 17 minutes of the model's work
_FLUSH_PAIRS = 10_000


class ResilientStore:
    """One failure marks the store down; then nobody waits for it until a probe, once a second, succeeds.

    State: `_up`; `_unsaved`, the answers that no write has taken yet: they cost the model a slot, so they
    are kept (bounded) and written as soon as the store takes them; `_asked_at`, when the first of them was
    asked for. Event loop only; an answer leaves `_unsaved` only after its write was confirmed, and only if
    no newer one took its place.

    An answer may have been asked for before it was invalidated, and be written after that: so whoever has
    written looks for tombstones, and takes back what has one. Of the two, one sees what the other did.
    """

    def __init__(
        self,
        store: AnswerStore,
        *,
        metrics: ProxyMetrics,
        freshness: FreshnessPolicy | None = None,
        invalidation_log: InvalidationLog | None = None,
        clock: StoreClock | None = None,
    ) -> None:
        self._store = store
        self._invalidation_log = invalidation_log
        self._freshness = freshness or FreshnessPolicy()
        self._clock = clock or StoreClock()
        self._metrics = metrics
        self._available = True
        self._rejecting_writes = False
        self._pending: dict[bytes, int] = {}
        self._oldest_request_at = math.inf
        self._probe_task: asyncio.Task[None] | None = None
        self.last_failure: tuple[str, float] | None = None
        """Its kind, and when it was, on time.monotonic."""
        self._update_gauge()

    @property
    def available(self) -> bool:
        """Whether the store answered when it was last asked."""
        return self._available

    @property
    def rejecting_writes(self) -> bool:
        """Whether it answers, but took no write when it was last asked to."""
        return self._rejecting_writes

    async def get_levels(self, digests: Sequence[bytes]) -> Sequence[int]:
        """The level of each digest, by position; 0 where none is fresh or nothing can be learnt."""
        entries = await self.get_entries(digests)
        day = self._clock.today()
        return [entry_level(entry) if self._freshness.is_fresh(entry, day=day) else 0 for entry in entries]

    async def get_entries(self, digests: Sequence[bytes]) -> Sequence[int]:
        """By position: the entry of each digest that may be answered, stale if that is served; else 0."""
        entries: Sequence[int] = bytes(len(digests))
        if self._available:
            try:
                entries = await self._store.get(digests)
            except StoreError as error:
                self._on_failure(error)
        if self._pending:
            unsaved, day = self._pending, self._clock.today()
            entries = [
                pack_entry(unsaved[digest], day) if digest in unsaved else entry
                for digest, entry in zip(digests, entries, strict=True)
            ]
        day, lifetime = self._clock.today(), self._freshness
        if lifetime.ttl_days:
            served = {entry: lifetime.servable(entry, day=day) for entry in set(entries)}  # they are few
            entries = [served[entry] for entry in entries]
        return entries

    async def put(self, levels_by_digest: Mapping[bytes, int], *, requested_at: float = math.inf) -> None:
        """Remember levels, now or as soon as the store takes them.

        But none that was invalidated since the model was asked: at `asked_at` on time.monotonic, or just now.
        """
        requested_at = min(requested_at, time.monotonic())
        if self._available and not self._pending:
            try:
                await self._write(levels_by_digest, requested_at)
            except StoreError as error:
                self._on_failure(error)
            else:
                return
        self._oldest_request_at = (
            min(requested_at, self._oldest_request_at) if self._pending else requested_at
        )
        self._pending.update(levels_by_digest)
        if len(self._pending) > _MAX_PENDING_PAIRS:
            for digest in list(itertools.islice(self._pending, len(self._pending) - _MAX_PENDING_PAIRS)):
                del self._pending[digest]
        self._ensure_probe()

    def drop_pending(self, digest: bytes) -> None:
        """Forget an answer that is not saved yet: it was invalidated."""
        self._pending.pop(digest, None)

    def drop_all_pending(self) -> None:
        """Forget every answer that is not saved yet."""
        self._pending.clear()

    async def close(self) -> None:
        """Write what is unsaved if that is possible now, then close the store."""
        if self._probe_task is not None:
            await cancel_and_wait([self._probe_task])
        if self._pending:
            try:
                await self._flush()
            except StoreError as error:
                _log.error("%d answers could not be saved: %s", len(self._pending), error)
        await self._store.close()

    def _on_failure(self, error: StoreError) -> None:
        self.last_failure = (error.kind, time.monotonic())
        if isinstance(error, StoreRejectedError):  # it answers: reading may still work, so only say it once
            if not self._rejecting_writes:
                self._rejecting_writes = True
                _log.warning("the store refuses: %s", error)
        elif self._available:
            self._available = False
            _log.warning("the store is down, answering without it: %s", error)
            self._update_gauge()
        self._ensure_probe()

    def _ensure_probe(self) -> None:
        if self._probe_task is None or self._probe_task.done():
            self._probe_task = asyncio.create_task(
                self._probe_loop(), context=Context()
            )  # it is nobody's RPC

    async def _probe_loop(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_INTERVAL_SECONDS)
            try:
                await self._store.get([_PROBE_DIGEST])
                if not self._available:
                    self._available = True
                    _log.info("the store is back")
                    self._update_gauge()
                await self._flush()
            except StoreError as error:
                self._on_failure(error)
                continue
            if self._rejecting_writes:
                self._rejecting_writes = False
                _log.info("the store refuses no more")
            return

    async def _write(self, levels_by_digest: Mapping[bytes, int], requested_at: float) -> None:
        """Raises `StoreError`: then it is not known what is done, and all of it has to be done again."""
        await self._store.put(levels_by_digest)
        if self._invalidation_log is None:
            return
        gone = await self._invalidation_log.invalidated_since(
            list(levels_by_digest), since_monotonic=requested_at
        )
        if gone:
            await self._store.delete(gone)
            await self._invalidation_log.add(gone)  # somebody may have looked them up while they were there

    async def _flush(self) -> None:
        while self._pending:
            batch = dict(itertools.islice(self._pending.items(), _FLUSH_PAIRS))
            await self._write(batch, self._oldest_request_at)
            for digest, level in batch.items():
                if self._pending.get(digest) == level:
                    del self._pending[digest]

    def _update_gauge(self) -> None:
        self._metrics.store_up.set(self._available)
