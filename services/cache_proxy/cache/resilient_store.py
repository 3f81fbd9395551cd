"""A store that never raises: without its server it returns misses, and writes are delayed."""

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
# About 200 MB, and 17 minutes of the model's work.
_MAX_PENDING_PAIRS = 1_000_000
_FLUSH_PAIRS = 10_000


class ResilientStore:
    """Protect callers from a failing store with a circuit breaker and delayed writes.

    One failure marks the store as unavailable. From then on nothing waits for it until a probe, sent once a
    second, succeeds.

    An answer can be requested before its pair is invalidated and written after that. So after each write the
    tombstones of the written pairs are read, and pairs that have one are deleted again. The invalidation adds
    its tombstone before it deletes; the writer reads tombstones after it wrote. Whatever the order of the
    two, one of them sees what the other did.

    State: `_available`; `_pending`, the answers that no write has stored yet, and `_oldest_request_at`, when
    the first of them was requested. A pending answer cost a slot of the model, so it is kept (up to a bound)
    and written as soon as the store accepts writes. It leaves `_pending` only after its write was confirmed
    and only if no newer answer replaced it. Used from the event loop only.
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
        """The kind of the last failure and its time on `time.monotonic()`."""
        self._update_gauge()

    @property
    def available(self) -> bool:
        """Whether the store replied to the last operation."""
        return self._available

    @property
    def rejecting_writes(self) -> bool:
        """Whether the store replied to the last write by rejecting it."""
        return self._rejecting_writes

    async def get_levels(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Return one level for each digest; 0 where no fresh answer is known or the store is unavailable."""
        entries = await self.get_entries(digests)
        day = self._clock.today()
        return [entry_level(entry) if self._freshness.is_fresh(entry, day=day) else 0 for entry in entries]

    async def get_entries(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Return one entry for each digest, 0 where none may be served.

        Stale entries are included if the freshness policy serves them.
        """
        entries: Sequence[int] = bytes(len(digests))
        if self._available:
            try:
                entries = await self._store.get(digests)
            except StoreError as error:
                self._on_failure(error)
        # Pending answers are newer than what is stored.
        if self._pending:
            pending = self._pending
            day = self._clock.today()
            entries = [
                pack_entry(pending[digest], day) if digest in pending else entry
                for digest, entry in zip(digests, entries, strict=True)
            ]
        day = self._clock.today()
        freshness = self._freshness
        if freshness.ttl_days:
            # A batch has few different entries, so each is judged once.
            servable = {entry: freshness.servable(entry, day=day) for entry in set(entries)}
            entries = [servable[entry] for entry in entries]
        return entries

    async def put(self, levels_by_digest: Mapping[bytes, int], *, requested_at: float = math.inf) -> None:
        """Store levels, now or as soon as the store accepts writes.

        Pairs that were invalidated after `requested_at` are left out. It is the time, on `time.monotonic()`,
        at which the model was called; by default the current time.
        """
        requested_at = min(requested_at, time.monotonic())
        if self._available and not self._pending:
            try:
                await self._write(levels_by_digest, requested_at)
            except StoreError as error:
                self._on_failure(error)
            else:
                return
        # The store did not take them, or older answers wait before them: keep them, up to the bound, and drop
        # the oldest beyond it.
        self._oldest_request_at = (
            min(requested_at, self._oldest_request_at) if self._pending else requested_at
        )
        self._pending.update(levels_by_digest)
        if len(self._pending) > _MAX_PENDING_PAIRS:
            for digest in list(itertools.islice(self._pending, len(self._pending) - _MAX_PENDING_PAIRS)):
                del self._pending[digest]
        self._ensure_probe()

    def drop_pending(self, digest: bytes) -> None:
        """Drop a pending answer because its pair was invalidated."""
        self._pending.pop(digest, None)

    def drop_all_pending(self) -> None:
        """Drop all pending answers."""
        self._pending.clear()

    async def close(self) -> None:
        """Write the pending answers if that is possible now, then close the store."""
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
        if isinstance(error, StoreRejectedError):
            # The server replied, so look-ups may still work: it stays available. Log the change only.
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
            # An empty context: the probe belongs to no RPC and must not add to its trace.
            self._probe_task = asyncio.create_task(self._probe_loop(), context=Context())

    async def _probe_loop(self) -> None:
        """Probe the store until it replies and all pending answers are written."""
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
        """Write levels and delete those that were invalidated meanwhile.

        Raises `StoreError`. It is not known then how much was done, so all of it must be repeated.
        """
        await self._store.put(levels_by_digest)
        if self._invalidation_log is None:
            return
        invalidated = await self._invalidation_log.invalidated_since(
            list(levels_by_digest), since_monotonic=requested_at
        )
        if invalidated:
            await self._store.delete(invalidated)
            # Another replica may have read them before they were deleted.
            await self._invalidation_log.add(invalidated)

    async def _flush(self) -> None:
        """Write all pending answers. Raises `StoreError`."""
        while self._pending:
            batch = dict(itertools.islice(self._pending.items(), _FLUSH_PAIRS))
            await self._write(batch, self._oldest_request_at)
            for digest, level in batch.items():
                if self._pending.get(digest) == level:
                    del self._pending[digest]

    def _update_gauge(self) -> None:
        self._metrics.store_up.set(self._available)
