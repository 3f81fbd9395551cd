"""How an invalidated pair leaves every replica's memory within a second: a log in Redis.

The log is a list, and an entry begins with a token that no other has. A reader keeps the last token it saw,
and looks for it: what stands behind is new to it. If the token is not there any more, whatever the cause (a
flush, a failover that lost the end of the log, a reader that was away for long), it may have missed
something, and forgets everything. So nothing depends on numbers that a restored server would give twice.

The log stands beside the miss queue's keys, whose heartbeat tells its last entry: four replicas that asked
for it by themselves, twice a second each, would be most of what Redis hears of an idle fleet.
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.cache_proxy.errors import StoreError, StoreRefused
from services.cache_proxy.key import DIGEST_BYTES
from services.cache_proxy.store.servers import Servers, heal

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_TOKEN_BYTES = 8
_ALL = b"*"
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

    async def _append(self, entries: list[bytes]) -> None:
        await heal(self.servers, self.key, "RPUSH", self.key, *entries)
        await self.servers.command(self.key, "LTRIM", self.key, -_KEPT, -1)


class Follower:
    """Reads a log for as long as the proxy runs.

    State: `_last`, the last entry seen, None if the log was empty; `_news`, set when it has another by now;
    `_garbage`, whether it was said that the log is none.
    """

    def __init__(
        self, log: InvalidationLog, *, remove: Callable[[bytes], None], clear: Callable[[], None]
    ) -> None:
        self._log = log
        self._remove = remove
        self._clear = clear
        self._last: bytes | None = None
        self._news = asyncio.Event()
        self._garbage = False

    def hear(self, last: bytes | None) -> None:
        """Somebody else has seen the last entry."""
        if last != self._last:
            self._news.set()

    async def run(self, *, polling: bool) -> None:
        """Follow until cancelled: look by itself if `polling`, else only when it hears of something.

        While Redis cannot be reached, nothing can be learnt.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS if polling else None):
                    await self._news.wait()
            self._news.clear()
            try:
                await self.poll()
                self._garbage = False
            except StoreRefused as error:  # the log is no log
                if not self._garbage:
                    _log.warning("the log of invalidations is garbage, forgetting everything: %s", error)
                self._garbage = True
                self._last = None
                self._clear()
            except StoreError:
                pass  # the token will tell, once it is back, whether something was missed

    async def poll(self) -> None:
        """Act on what is new. Raises `StoreError`."""
        servers, key = self._log.servers, self._log.key
        last = await servers.command(key, "LINDEX", key, -1)
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
            else:  # all, or garbage: then too
                self._clear()
