"""How much of what callers sent, and do not read, is held at once.

gRPC bounds one message, not how many are on their way in, worked on, or waiting for a caller that does not
read them; and a connection cannot be closed from here. So every message is read by the servicer itself, and
what it brings is counted by connection until its answer is gone. A caller is told to come back before it may
hold more than its share; one that holds little is let in whatever others hold.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from services.cache_proxy.errors import QueueFullError

_WORKING_BYTES_PER_PAIR = (
    600  # what the proxy itself makes of a pair while it looks for its level, at most (measured)
)
_CHECK_INTERVAL_SECONDS = 0.25
_SLOW_AFTER_CHECKS = 3  # more than half a second; a loop that was busy reads what has come between two looks
_MAX_CHECKS = 240  # a minute: 64 MiB in it are 9 Mbit/s
_MAX_SLOW_READS = 8
_MAX_SLOW_READS_PER_CONNECTION = 4
_SMALL_RESPONSE_BYTES = 1024
_RETRY_AFTER_SECONDS = 1.0

Context = aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True, slots=True)
class InboundLimits:
    """Bytes held of all connections, of one, and what each may hold whatever others do."""

    total_bytes: int
    connection_bytes: int
    guaranteed_bytes: int

    @classmethod
    def for_max_request(cls, max_request_bytes: int) -> "InboundLimits":
        """By the largest request: two of them fit a connection with all that is made of them."""
        return cls(16 * max_request_bytes, 8 * max_request_bytes, max_request_bytes // 4)


@dataclass(slots=True)
class _Connection:
    """What one has under way; it is forgotten when that is nothing."""

    held_bytes: int = 0
    slow_reads: int = 0


@dataclass(slots=True, eq=False)
class _PendingRead:
    """A message that has not come yet: how often it was looked for, and why it is not waited for any more."""

    context: Context
    task: "asyncio.Task[Any] | None"
    checks: int = 0
    is_slow: bool = False
    rejection: str = ""


@dataclass(slots=True)
class InboundLimiter:
    """State: `_connections` by peer and the sums over them; `_reading`, and whether somebody looks after it;
    event loop only.
    """  # noqa: D205 - one thought

    limits: InboundLimits
    _connections: dict[str, _Connection] = field(default_factory=dict)
    _held_bytes: int = 0
    _slow_reads: int = 0
    _pending: set[_PendingRead] = field(default_factory=set)
    _is_check_scheduled: bool = False

    async def read(self, context: Context) -> bytes | None:
        """The message of an RPC; None if there is none. Raises `QueueFullError`.

        Nearly all are there at once. Of those that are not, few may be on their way, and not for long.
        """
        reading = _PendingRead(context, asyncio.current_task())
        self._pending.add(reading)
        if not self._is_check_scheduled:
            self._is_check_scheduled = True
            asyncio.get_running_loop().call_later(_CHECK_INTERVAL_SECONDS, self._check_pending)
        try:
            message: object = await context.read()
        except asyncio.CancelledError:
            if not reading.rejection or (reading.task and reading.task.uncancel()):
                raise  # the caller went away
            raise QueueFullError(reading.rejection, _RETRY_AFTER_SECONDS) from None
        finally:
            self._pending.discard(reading)
            if reading.is_slow:
                self._adjust(context.peer(), slow_reads=-1)
        return message if isinstance(message, bytes) else None  # else it is `aio.EOF`

    def _check_pending(self) -> None:
        self._is_check_scheduled = bool(self._pending)
        for reading in self._pending:
            reading.checks += 1
            if reading.checks == _SLOW_AFTER_CHECKS:
                self._classify_slow(reading)
            elif reading.checks == _MAX_CHECKS:
                self._reject(reading, "the request took too long to arrive")
        if self._is_check_scheduled:
            asyncio.get_running_loop().call_later(_CHECK_INTERVAL_SECONDS, self._check_pending)

    def _classify_slow(self, reading: _PendingRead) -> None:
        peer = reading.context.peer()
        known = self._connections.get(peer)
        if self._slow_reads >= _MAX_SLOW_READS or (
            known and known.slow_reads >= _MAX_SLOW_READS_PER_CONNECTION
        ):
            self._reject(reading, "the request arrives slowly, and too many others do")
        else:
            reading.is_slow = True
            self._adjust(peer, slow_reads=1)

    @staticmethod
    def _reject(reading: _PendingRead, refusal: str) -> None:
        reading.rejection = refusal
        if reading.task is not None:
            reading.task.cancel()

    @contextmanager
    def track_request(self, context: Context, size_bytes: int, *, pairs: int) -> Iterator[None]:
        """Count a request while it is worked on. Raises `QueueFullError`; never for one that is alone."""
        size, peer = size_bytes + _WORKING_BYTES_PER_PAIR * pairs, context.peer()
        known = self._connections.get(peer)
        of_one, of_all = (known.held_bytes if known else 0) + size, self._held_bytes + size
        if (of_one > max(size, self.limits.connection_bytes)) or (
            of_all > max(size, self.limits.total_bytes) and of_one > self.limits.guaranteed_bytes
        ):
            text = f"{of_one - size} bytes of requests and unread answers are held for this connection"
            raise QueueFullError(text, _RETRY_AFTER_SECONDS)
        self._adjust(peer, held_bytes=size)
        try:
            yield
        finally:
            self._adjust(peer, held_bytes=-size)

    def track_response(self, context: Context, size_bytes: int) -> None:
        """Count an answer until its caller has read it, or is gone. Of small ones, streams are the bound."""
        if size_bytes <= _SMALL_RESPONSE_BYTES:
            return
        peer = context.peer()
        self._adjust(peer, held_bytes=size_bytes)
        context.add_done_callback(
            lambda _: self._adjust(peer, held_bytes=-size_bytes)  # type: ignore[arg-type]
        )

    def _adjust(self, peer: str, *, held_bytes: int = 0, slow_reads: int = 0) -> None:
        one = self._connections.setdefault(peer, _Connection())
        one.held_bytes += held_bytes
        one.slow_reads += slow_reads
        self._held_bytes += held_bytes
        self._slow_reads += slow_reads
        if not one.held_bytes and not one.slow_reads:
            del self._connections[peer]
