"""The log in Redis by which an invalidated pair leaves the memory of every replica within a second.

The log is a list. Each entry begins with a random token that no other entry has. A reader keeps the last
entry that it saw and searches the list for it: all entries behind it are new. If the entry is no longer
there, the reader may have missed an invalidation, and it clears its whole memory. That covers every cause: a
flush, a failover that lost the end of the log, a reader that was disconnected for long. So nothing depends on
sequence numbers, which a restored server would assign twice.

One empty log looks like another. So a reader that finds the log empty adds a marker entry.

The log is stored beside the keys of the miss queue, and the queue's heartbeat returns its last entry. Without
that, four replicas that poll the log twice a second each would cause most of the commands of an idle fleet.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.cache_proxy.cache.cache_scripts import TOMBSTONE_AGES
from services.cache_proxy.domain import DIGEST_BYTES
from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.redis_client.backend import (
    RedisBackend,
    ScriptCall,
    is_wrong_type,
    run_replacing_wrong_type,
)
from services.cache_proxy.redis_keys import tombstones_key

_log = logging.getLogger(__name__)

_POLL_INTERVAL_SECONDS = 0.5
_TOKEN_BYTES = 8
# What follows the token where it is no digest: all pairs, or none.
_ALL_PAIRS = b"*"
_MARKER = b"-"
_MAX_LOG_ENTRIES = 10_000
_MAX_READ_ENTRIES = 1_000


@dataclass(frozen=True, slots=True)
class InvalidationLog:
    """The log of one namespace, stored under `key`."""

    backend: RedisBackend
    key: str

    async def add(self, digests: Sequence[bytes]) -> None:
        """Make every replica drop these pairs. Raises `StoreError`."""
        await self._append([secrets.token_bytes(_TOKEN_BYTES) + digest for digest in digests])

    async def add_all(self) -> None:
        """Make every replica drop all pairs. Raises `StoreError`."""
        await self._append([secrets.token_bytes(_TOKEN_BYTES) + _ALL_PAIRS])

    async def invalidated_since(self, digests: Sequence[bytes], *, since_monotonic: float) -> list[bytes]:
        """Return those digests that were invalidated after a time on `time.monotonic()`.

        They are found by their tombstones. A tombstone is added before the entry is deleted; the entry in
        this log is added last. Raises `StoreError`.
        """
        invalidated = []
        for start in range(0, len(digests), _MAX_READ_ENTRIES):
            chunk = digests[start : start + _MAX_READ_ENTRIES]
            call = ScriptCall(tombstones_key(self.key), [b"".join(chunk)])
            [ages_ms] = await self.backend.run_script(TOMBSTONE_AGES, [call])
            if isinstance(ages_ms, StoreError):
                raise ages_ms
            # Redis counts whole milliseconds.
            passed_ms = (time.monotonic() - since_monotonic) * 1000 + 1
            invalidated += [
                digest for digest, age in zip(chunk, ages_ms, strict=False) if 0 <= age <= passed_ms
            ]
        return invalidated

    async def add_marker(self) -> bytes | None:
        """Add an entry without meaning, so that its loss shows that the log was lost.

        Return the entry if it is the first of the log: then no missed entry precedes it. Raises `StoreError`.
        """
        entry = secrets.token_bytes(_TOKEN_BYTES) + _MARKER
        count = await run_replacing_wrong_type(self.backend, self.key, "RPUSH", self.key, entry)
        return entry if count == 1 else None

    async def _append(self, entries: list[bytes]) -> None:
        await run_replacing_wrong_type(self.backend, self.key, "RPUSH", self.key, *entries)
        await self.backend.execute(self.key, "LTRIM", self.key, -_MAX_LOG_ENTRIES, -1)


class InvalidationFollower:
    """Read a log and apply its new entries by `remove` and `clear`.

    It reads when `on_log_tail` reports a new last entry, or, without a queue in Redis, by polling (`run`).

    State: `_last_entry`, the last entry that was read, None if the log was empty; `_read_failure_logged`,
    whether it was logged that the log cannot be read. Used from the event loop only.
    """

    def __init__(
        self, log: InvalidationLog, *, remove: Callable[[bytes], None], clear: Callable[[], None]
    ) -> None:
        self._log = log
        self._remove = remove
        self._clear = clear
        self._last_entry: bytes | None = None
        self._read_failure_logged = False

    async def on_log_tail(self, last_entry: bytes | None) -> None:
        """Read the log if its last entry, as a heartbeat returned it, is new."""
        if last_entry is None or last_entry != self._last_entry:
            await self._sync()

    async def run(self) -> None:
        """Poll the log until cancelled; for use where no heartbeat returns its last entry."""
        while True:
            await asyncio.sleep(_POLL_INTERVAL_SECONDS)
            await self._sync()

    async def _sync(self) -> None:
        """Read the log, and log a failure once if Redis rejects the read."""
        try:
            await self.poll()
            self._read_failure_logged = False
        except StoreRejectedError as error:
            if not self._read_failure_logged:
                _log.warning("the log of invalidations cannot be read: %s", error)
            self._read_failure_logged = True
        except StoreError:
            # Redis is unreachable. Once it is back, the last entry shows whether something was missed.
            pass

    async def poll(self) -> None:
        """Apply the new entries of the log. Raises `StoreError`."""
        backend = self._log.backend
        key = self._log.key
        try:
            last_entry = await backend.execute(key, "LINDEX", key, -1)
        except StoreRejectedError as error:
            if not is_wrong_type(error):
                raise
            # If the key held a log before, its entries are lost.
            self._last_entry = b""
            last_entry = None
        if last_entry is None:
            if self._last_entry is not None:
                self._last_entry = None
                self._clear()
            # The marker cannot be added while Redis is full.
            with contextlib.suppress(StoreRejectedError):
                self._last_entry = await self._log.add_marker()
            return
        if last_entry == self._last_entry:
            return
        entries: list[bytes] = await backend.execute(key, "LRANGE", key, -_MAX_READ_ENTRIES, -1)
        if self._last_entry in entries:
            new_entries = entries[len(entries) - entries[::-1].index(self._last_entry) :]
        else:
            new_entries = [bytes(_TOKEN_BYTES) + _ALL_PAIRS]
        self._last_entry = entries[-1] if entries else None
        for entry in new_entries:
            digest = entry[_TOKEN_BYTES:]
            if len(digest) == DIGEST_BYTES:
                self._remove(digest)
            elif digest != _MARKER:
                # All pairs were invalidated, or the entry is garbage and may have been any entry.
                self._clear()
