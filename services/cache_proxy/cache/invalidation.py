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

from services.cache_proxy.cache.cache_scripts import BURIED
from services.cache_proxy.cache.key import DIGEST_BYTES
from services.cache_proxy.errors import StoreError, StoreRefused
from services.cache_proxy.redis_client.backend import Call, Servers, heal, is_wrong_type

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_TOKEN_BYTES = 8
_ALL, _MARK = b"*", b"-"
_KEPT, _READ = 10_000, 1_000  # entries in the log; as many as a reader fetches at once


@dataclass(frozen=True, slots=True)
class InvalidationLog:
    """The log of one namespace; `key` is where it is."""

    servers: Servers
    key: str

    async def add(self, digests: Sequence[bytes]) -> None:
        """Have every replica forget these. Raises `StoreError`."""
        await self._append([secrets.token_bytes(_TOKEN_BYTES) + digest for digest in digests])

    async def add_all(self) -> None:
        """Have every replica forget everything. Raises `StoreError`."""
        await self._append([secrets.token_bytes(_TOKEN_BYTES) + _ALL])

    async def buried(self, digests: Sequence[bytes], *, since: float) -> list[bytes]:
        """Those that were invalidated later than that, on time.monotonic. Raises `StoreError`.

        By their tombstones, which stand before anything is forgotten; an entry of the log comes last.
        """
        found = []
        tombs = f"{self.key.removesuffix('log')}tombs"
        for start in range(0, len(digests), _READ):
            some = digests[start : start + _READ]
            [ages_ms] = await self.servers.run(BURIED, [Call(tombs, [b"".join(some)])])
            if isinstance(ages_ms, StoreError):
                raise ages_ms
            passed_ms = (time.monotonic() - since) * 1000 + 1  # Redis counts whole ones
            found += [digest for digest, age in zip(some, ages_ms, strict=False) if 0 <= age <= passed_ms]
        return found

    async def mark(self) -> bytes | None:
        """Have an entry there that says nothing, so that its loss says something.

        The entry, if it is the first: then nothing that was missed stands before it. Raises `StoreError`.
        """
        entry = secrets.token_bytes(_TOKEN_BYTES) + _MARK
        count = await heal(self.servers, self.key, "RPUSH", self.key, entry)
        return entry if count == 1 else None

    async def _append(self, entries: list[bytes]) -> None:
        await heal(self.servers, self.key, "RPUSH", self.key, *entries)
        await self.servers.command(self.key, "LTRIM", self.key, -_KEPT, -1)


class Follower:
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
        self._last: bytes | None = None
        self._refused = False

    async def hear(self, last: bytes | None) -> None:
        """Somebody else has seen the last entry: act on what is new, if that can be read now."""
        if last is None or last != self._last:
            await self._catch_up()

    async def run(self) -> None:
        """Look by itself, until cancelled, where nobody else tells."""
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            await self._catch_up()

    async def _catch_up(self) -> None:
        """While Redis cannot be reached, nothing can be learnt."""
        try:
            await self.poll()
            self._refused = False
        except StoreRefused as error:
            if not self._refused:
                _log.warning("the log of invalidations cannot be read: %s", error)
            self._refused = True
        except StoreError:
            pass  # the token will tell, once it is back, whether something was missed

    async def poll(self) -> None:
        """Act on what is new. Raises `StoreError`."""
        servers, key = self._log.servers, self._log.key
        try:
            last = await servers.command(key, "LINDEX", key, -1)
        except StoreRefused as error:
            if not is_wrong_type(error):
                raise
            self._last = b""  # what was said is lost, if it was a log once
            last = None
        if last is None:
            if self._last is not None:
                self._last = None
                self._clear()
            with contextlib.suppress(StoreRefused):  # Redis may be full
                self._last = await self._log.mark()
            return
        if last == self._last:
            return
        entries: list[bytes] = await servers.command(key, "LRANGE", key, -_READ, -1)
        if self._last in entries:
            news = entries[len(entries) - entries[::-1].index(self._last) :]
        else:
            news = [bytes(_TOKEN_BYTES) + _ALL]
        self._last = entries[-1] if entries else None
        for entry in news:
            digest = entry[_TOKEN_BYTES:]
            if len(digest) == DIGEST_BYTES:
                self._remove(digest)
            elif digest != _MARK:  # all, or garbage: then too
                self._clear()
