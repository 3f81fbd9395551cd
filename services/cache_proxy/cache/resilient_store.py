"""A store that never raises: while it is down it knows nothing, and what it missed is written later."""

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextvars import Context

from services.cache_proxy.cache.entry import Lifetime, dated, level_of
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.key import DIGEST_BYTES
from services.cache_proxy.cache.store import Store
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.errors import StoreError, StoreRefused
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.common.tasks import end

_log = logging.getLogger(__name__)

_PROBE_SECONDS = 1.0
_PROBE_DIGEST = bytes(DIGEST_BYTES)
_MAX_UNSAVED = 1_000_000  # about 200 MB, and 17 minutes of the model's work
_FLUSH_PAIRS = 10_000


class GuardedStore:
    """One failure marks the store down; then nobody waits for it until a probe, once a second, succeeds.

    State: `_up`; `_unsaved`, the answers that no write has taken yet: they cost the model a slot, so they
    are kept (bounded) and written as soon as the store takes them; `_asked_at`, when the first of them was
    asked for. Event loop only; an answer leaves `_unsaved` only after its write was confirmed, and only if
    no newer one took its place.

    An answer may have been asked for before it was invalidated, and be written after that: so whoever has
    written looks for tombstones, and takes back what has one. Of the two, one sees what the other did.
    """

    def __init__(
        self, store: Store, *, metrics: ProxyMetrics, lifetime: Lifetime | None = None,
        log: InvalidationLog | None = None, clock: StoreClock | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self._log = log
        self._lifetime = lifetime or Lifetime()
        self._clock = clock or StoreClock()
        self._metrics = metrics
        self._up = True
        self._refusing = False
        self._unsaved: dict[bytes, int] = {}
        self._asked_at = math.inf
        self._probe: asyncio.Task[None] | None = None
        self.last_failure: tuple[str, float] | None = None
        """Its kind, and when it was, on time.monotonic."""
        self._show()

    @property
    def up(self) -> bool:
        """Whether the store answered when it was last asked."""
        return self._up

    @property
    def refusing(self) -> bool:
        """Whether it answers, but took no write when it was last asked to."""
        return self._refusing

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """The level of each digest, by position; 0 where none is fresh or nothing can be learnt."""
        entries = await self.look_up(digests)
        day = self._clock.today()
        return [level_of(entry) if self._lifetime.is_fresh(entry, day=day) else 0 for entry in entries]

    async def look_up(self, digests: Sequence[bytes]) -> Sequence[int]:
        """By position: the entry of each digest that may be answered, stale if that is served; else 0."""
        entries: Sequence[int] = bytes(len(digests))
        if self._up:
            try:
                entries = await self._store.get(digests)
            except StoreError as error:
                self._failed(error)
        if self._unsaved:
            unsaved, day = self._unsaved, self._clock.today()
            entries = [
                dated(unsaved[digest], day) if digest in unsaved else entry
                for digest, entry in zip(digests, entries, strict=True)
            ]
        day, lifetime = self._clock.today(), self._lifetime
        if lifetime.ttl_days:
            served = {entry: lifetime.served(entry, day=day) for entry in set(entries)}  # they are few
            entries = [served[entry] for entry in entries]
        return entries

    async def put(self, levels: Mapping[bytes, int], *, asked_at: float = math.inf) -> None:
        """Remember levels, now or as soon as the store takes them.

        But none that was invalidated since the model was asked: at `asked_at` on time.monotonic, or just now.
        """
        asked_at = min(asked_at, time.monotonic())
        if self._up and not self._unsaved:
            try:
                await self._save(levels, asked_at)
            except StoreError as error:
                self._failed(error)
            else:
                return
        self._asked_at = min(asked_at, self._asked_at) if self._unsaved else asked_at
        self._unsaved.update(levels)
        if len(self._unsaved) > _MAX_UNSAVED:
            for digest in list(itertools.islice(self._unsaved, len(self._unsaved) - _MAX_UNSAVED)):
                del self._unsaved[digest]
        self._ensure_probe()

    def discard(self, digest: bytes) -> None:
        """Forget an answer that is not saved yet: it was invalidated."""
        self._unsaved.pop(digest, None)

    def discard_all(self) -> None:
        """Forget every answer that is not saved yet."""
        self._unsaved.clear()

    async def close(self) -> None:
        """Write what is unsaved if that is possible now, then close the store."""
        if self._probe is not None:
            await end([self._probe])
        if self._unsaved:
            try:
                await self._flush()
            except StoreError as error:
                _log.error("%d answers could not be saved: %s", len(self._unsaved), error)
        await self._store.close()

    def _failed(self, error: StoreError) -> None:
        self.last_failure = (error.kind, time.monotonic())
        if isinstance(error, StoreRefused):  # it answers: reading may still work, so only say it once
            if not self._refusing:
                self._refusing = True
                _log.warning("the store refuses: %s", error)
        elif self._up:
            self._up = False
            _log.warning("the store is down, answering without it: %s", error)
            self._show()
        self._ensure_probe()

    def _ensure_probe(self) -> None:
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._heal(), context=Context())  # it is nobody's RPC

    async def _heal(self) -> None:
        while True:
            await asyncio.sleep(_PROBE_SECONDS)
            try:
                await self._store.get([_PROBE_DIGEST])
                if not self._up:
                    self._up = True
                    _log.info("the store is back")
                    self._show()
                await self._flush()
            except StoreError as error:
                self._failed(error)
                continue
            if self._refusing:
                self._refusing = False
                _log.info("the store refuses no more")
            return

    async def _save(self, levels: Mapping[bytes, int], asked_at: float) -> None:
        """Raises `StoreError`: then it is not known what is done, and all of it has to be done again."""
        await self._store.put(levels)
        if self._log is None:
            return
        gone = await self._log.buried(list(levels), since=asked_at)
        if gone:
            await self._store.forget(gone)
            await self._log.add(gone)  # somebody may have looked them up while they were there

    async def _flush(self) -> None:
        while self._unsaved:
            batch = dict(itertools.islice(self._unsaved.items(), _FLUSH_PAIRS))
            await self._save(batch, self._asked_at)
            for digest, level in batch.items():
                if self._unsaved.get(digest) == level:
                    del self._unsaved[digest]

    def _show(self) -> None:
        self._metrics.store_up.set(self._up)
