"""Limit how many bytes of requests and unread responses are held at once.

gRPC limits the size of one message. It does not limit how many messages are arriving, being processed, or
waiting for a caller that does not read its responses, and a connection cannot be closed from here. The
servicer therefore reads every message itself, and the limiter counts by connection what a message takes until
its response was read. A request over the limit is rejected with pushback. A connection that holds little is
served whatever the others hold.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from services.cache_proxy.auth.caller import Context
from services.cache_proxy.errors import QueueFullError

# What the proxy allocates for a pair while it looks for its level, at most (measured).
_WORKING_BYTES_PER_PAIR = 600
_CHECK_INTERVAL_SECONDS = 0.25
# More than half a second. After a long block, the event loop reads what has arrived between two checks.
_SLOW_AFTER_CHECKS = 3
# A minute. To send 64 MiB in it takes 9 Mbit/s.
_MAX_CHECKS = 240
_MAX_SLOW_READS = 8
_MAX_SLOW_READS_PER_CONNECTION = 4
_SMALL_RESPONSE_BYTES = 1024
_RETRY_AFTER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class InboundLimits:
    """Byte limits: of all connections together, of each one, and what each may hold in any case."""

    total_bytes: int
    connection_bytes: int
    guaranteed_bytes: int

    @classmethod
    def for_max_request(cls, max_request_bytes: int) -> "InboundLimits":
        """Return limits that let a connection hold two requests of the maximum size during processing."""
        return cls(16 * max_request_bytes, 8 * max_request_bytes, max_request_bytes // 4)


@dataclass(slots=True)
class _Connection:
    """What a connection holds. Connections that hold nothing are forgotten."""

    held_bytes: int = 0
    slow_reads: int = 0


@dataclass(slots=True, eq=False)
class _PendingRead:
    """A message that has not arrived yet: how often it was checked, and why it was rejected, if it was."""

    context: Context
    task: "asyncio.Task[Any] | None"
    checks: int = 0
    is_slow: bool = False
    rejection: str = ""


@dataclass(slots=True)
class InboundLimiter:
    """Read messages, and count what each connection holds.

    State, used by the event loop only: `_connections` by peer, and the sums `_held_bytes` and `_slow_reads`
    over them; `_pending`, the messages that have not arrived; `_is_check_scheduled`.
    """

    limits: InboundLimits
    _connections: dict[str, _Connection] = field(default_factory=dict)
    _held_bytes: int = 0
    _slow_reads: int = 0
    _pending: set[_PendingRead] = field(default_factory=set)
    _is_check_scheduled: bool = False

    async def read(self, context: Context) -> bytes | None:
        """Return the message of an RPC, None if the caller sent none.

        Nearly all messages have arrived already. Only a few may be arriving slowly, and not for long: raise
        `QueueFullError` for the others.
        """
        pending = _PendingRead(context, asyncio.current_task())
        self._pending.add(pending)
        if not self._is_check_scheduled:
            self._is_check_scheduled = True
            asyncio.get_running_loop().call_later(_CHECK_INTERVAL_SECONDS, self._check_pending)
        try:
            message: object = await context.read()
        except asyncio.CancelledError:
            # Without a rejection, or with a second cancellation, it is the caller that has gone away.
            if not pending.rejection or (pending.task and pending.task.uncancel()):
                raise
            raise QueueFullError(pending.rejection, _RETRY_AFTER_SECONDS) from None
        finally:
            self._pending.discard(pending)
            if pending.is_slow:
                self._adjust(context.peer(), slow_reads=-1)
        # Anything else is `aio.EOF`.
        return message if isinstance(message, bytes) else None

    def _check_pending(self) -> None:
        """Reject messages that take too long to arrive, and check again later if any is left."""
        self._is_check_scheduled = bool(self._pending)
        for pending in self._pending:
            pending.checks += 1
            if pending.checks == _SLOW_AFTER_CHECKS:
                self._classify_slow(pending)
            elif pending.checks == _MAX_CHECKS:
                self._reject(pending, "the request took too long to arrive")
        if self._is_check_scheduled:
            asyncio.get_running_loop().call_later(_CHECK_INTERVAL_SECONDS, self._check_pending)

    def _classify_slow(self, pending: _PendingRead) -> None:
        """Count a message as slow, or reject it if there are too many slow ones."""
        peer = pending.context.peer()
        known = self._connections.get(peer)
        if self._slow_reads >= _MAX_SLOW_READS or (
            known and known.slow_reads >= _MAX_SLOW_READS_PER_CONNECTION
        ):
            self._reject(pending, "the request arrives slowly, and too many others do")
        else:
            pending.is_slow = True
            self._adjust(peer, slow_reads=1)

    @staticmethod
    def _reject(pending: _PendingRead, rejection: str) -> None:
        pending.rejection = rejection
        if pending.task is not None:
            pending.task.cancel()

    @contextmanager
    def track_request(self, context: Context, size_bytes: int, *, pairs: int) -> Iterator[None]:
        """Count a request while it is processed.

        Raise `QueueFullError` if it exceeds a limit. While nothing else is held, no request is rejected.
        """
        size = size_bytes + _WORKING_BYTES_PER_PAIR * pairs
        peer = context.peer()
        known = self._connections.get(peer)
        connection_bytes = (known.held_bytes if known else 0) + size
        total_bytes = self._held_bytes + size
        if (connection_bytes > max(size, self.limits.connection_bytes)) or (
            total_bytes > max(size, self.limits.total_bytes)
            and connection_bytes > self.limits.guaranteed_bytes
        ):
            text = (
                f"{connection_bytes - size} bytes of requests and unread answers are held for this connection"
            )
            raise QueueFullError(text, _RETRY_AFTER_SECONDS)
        self._adjust(peer, held_bytes=size)
        try:
            yield
        finally:
            self._adjust(peer, held_bytes=-size)

    def track_response(self, context: Context, size_bytes: int) -> None:
        """Count a response until its caller has read it or is gone.

        Small responses are not counted: the limit of concurrent streams bounds them.
        """
        if size_bytes <= _SMALL_RESPONSE_BYTES:
            return
        peer = context.peer()
        self._adjust(peer, held_bytes=size_bytes)
        context.add_done_callback(
            lambda _: self._adjust(peer, held_bytes=-size_bytes)  # type: ignore[arg-type]
        )

    def _adjust(self, peer: str, *, held_bytes: int = 0, slow_reads: int = 0) -> None:
        connection = self._connections.setdefault(peer, _Connection())
        connection.held_bytes += held_bytes
        connection.slow_reads += slow_reads
        self._held_bytes += held_bytes
        self._slow_reads += slow_reads
        if not connection.held_bytes and not connection.slow_reads:
            del self._connections[peer]
