"""How an invalidated pair leaves every replica's memory within a second: a log in Redis.

The log is a list, and an entry begins with a token that no other has. A reader keeps the last token it saw,
and looks for it: what stands behind is new to it. If the token is not there any more, whatever the cause (a
flush, a failover that lost the end of the log, a reader that was away for long), it may have missed
something, and forgets everything. One empty log is like another: so whoever finds one leaves a mark. So
nothing depends on numbers that a restored server would give twice.

The log stands beside the miss queue's keys, whose heartbeat tells its last entry: four replicas that asked
for it by themselves, twice a second each, would be most of what Redis hears of an idle fleet.
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
_ALL_PAIRS, _MARKER = b"*", b"-"
_MAX_LOG_ENTRIES, _MAX_READ_ENTRIES = 10_000, 1_000  # entries in the log; as many as a reader fetches at once


@dataclass(frozen=True, slots=True)
class InvalidationLog:
    """The log of one namespace; `key` is where it is."""

    backend: RedisBackend
    key: str

    async def add(self, digests: Sequence[bytes]) -> None:
        """Have every replica forget these. Raises `StoreError`."""
        await self._append([secrets.token_bytes(_TOKEN_BYTES) + digest for digest in digests])

    async def add_all(self) -> None:
        """Have every replica forget everything. Raises `StoreError`."""
        await self._append([secrets.token_bytes(_TOKEN_BYTES) + _ALL_PAIRS])

    async def invalidated_since(self, digests: Sequence[bytes], *, since_monotonic: float) -> list[bytes]:
        """Those that were invalidated later than that, on time.monotonic. Raises `StoreError`.

        By their tombstones, which stand before anything is forgotten; an entry of the log comes last.
        """
        found = []
        tombs = tombstones_key(self.key)
        for start in range(0, len(digests), _MAX_READ_ENTRIES):
            some = digests[start : start + _MAX_READ_ENTRIES]
            [ages_ms] = await self.backend.run_script(TOMBSTONE_AGES, [ScriptCall(tombs, [b"".join(some)])])
            if isinstance(ages_ms, StoreError):
                raise ages_ms
            passed_ms = (time.monotonic() - since_monotonic) * 1000 + 1  # Redis counts whole ones
            found += [digest for digest, age in zip(some, ages_ms, strict=False) if 0 <= age <= passed_ms]
        return found

    async def add_marker(self) -> bytes | None:
        """Have an entry there that says nothing, so that its loss says something.

        The entry, if it is the first: then nothing that was missed stands before it. Raises `StoreError`.
        """
        entry = secrets.token_bytes(_TOKEN_BYTES) + _MARKER
        count = await run_replacing_wrong_type(self.backend, self.key, "RPUSH", self.key, entry)
        return entry if count == 1 else None

    async def _append(self, entries: list[bytes]) -> None:
        await run_replacing_wrong_type(self.backend, self.key, "RPUSH", self.key, *entries)
        await self.backend.execute(self.key, "LTRIM", self.key, -_MAX_LOG_ENTRIES, -1)


class InvalidationFollower:
    """Reads a log, when it hears of something new there or, where nobody tells, by itself.

    State: `_last`, the last entry seen, None if the log was empty; `_refused`, whether it was said that it
    cannot be read.
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
        """Somebody else has seen the last entry: act on what is new, if that can be read now."""
        if last_entry is None or last_entry != self._last_entry:
            await self._sync()

    async def run(self) -> None:
        """Look by itself, until cancelled, where nobody else tells."""
        while True:
            await asyncio.sleep(_POLL_INTERVAL_SECONDS)
            await self._sync()

    async def _sync(self) -> None:
        """While Redis cannot be reached, nothing can be learnt."""
        try:
            await self.poll()
            self._read_failure_logged = False
        except StoreRejectedError as error:
            if not self._read_failure_logged:
                _log.warning("the log of invalidations cannot be read: %s", error)
            self._read_failure_logged = True
        except StoreError:
            pass  # the token will tell, once it is back, whether something was missed

    async def poll(self) -> None:
        """Act on what is new. Raises `StoreError`."""
        servers, key = self._log.backend, self._log.key
        try:
            last = await servers.execute(key, "LINDEX", key, -1)
        except StoreRejectedError as error:
            if not is_wrong_type(error):
                raise
            self._last_entry = b""  # what was said is lost, if it was a log once
            last = None
        if last is None:
            if self._last_entry is not None:
                self._last_entry = None
                self._clear()
            with contextlib.suppress(StoreRejectedError):  # Redis may be full
                self._last_entry = await self._log.add_marker()
            return
        if last == self._last_entry:
            return
        entries: list[bytes] = await servers.execute(key, "LRANGE", key, -_MAX_READ_ENTRIES, -1)
        if self._last_entry in entries:
            news = entries[len(entries) - entries[::-1].index(self._last_entry) :]
        else:
            news = [bytes(_TOKEN_BYTES) + _ALL_PAIRS]
        self._last_entry = entries[-1] if entries else None
        for entry in news:
            digest = entry[_TOKEN_BYTES:]
            if len(digest) == DIGEST_BYTES:
                self._remove(digest)
            elif digest != _MARKER:  # all, or garbage: then too
                self._clear()
