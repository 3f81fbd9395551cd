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

from services.cache_proxy.errors import QueueFull

_PAIR_BYTES = 600  # what the proxy itself makes of a pair while it looks for its level, at most (measured)
_LOOK_SECONDS = 0.25
_SLOW_LOOKS = 3  # more than half a second; a loop that was busy reads what has come between two looks
_MOST_LOOKS = 240  # a minute: 64 MiB in it are 9 Mbit/s
_SLOW_READS = 8
_SLOW_READS_OF_ONE = 4
_SMALL_ANSWER_BYTES = 1024
_RETRY_SECONDS = 1.0

Context = aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bytes held of all connections, of one, and what each may hold whatever others do."""

    all_bytes: int
    one_bytes: int
    small_bytes: int

    @classmethod
    def of(cls, max_request_bytes: int) -> "IntakeLimits":
        """By the largest request: two of them fit a connection with all that is made of them."""
        return cls(16 * max_request_bytes, 8 * max_request_bytes, max_request_bytes // 4)


@dataclass(slots=True)
class _Connection:
    """What one has under way; it is forgotten when that is nothing."""

    held_bytes: int = 0
    slow_reads: int = 0


@dataclass(slots=True, eq=False)
class _Reading:
    """A message that has not come yet: how often it was looked for, and why it is not waited for any more."""

    context: Context
    task: "asyncio.Task[Any] | None"
    looks: int = 0
    is_slow: bool = False
    refusal: str = ""


@dataclass(slots=True)
class Intake:
    """State: `_connections` by peer and the sums over them; `_reading`, and whether somebody looks after it;
    event loop only.
    """  # noqa: D205 - one thought

    limits: IntakeLimits
    _connections: dict[str, _Connection] = field(default_factory=dict)
    _held_bytes: int = 0
    _slow_reads: int = 0
    _reading: set[_Reading] = field(default_factory=set)
    _is_looking: bool = False

    async def read(self, context: Context) -> bytes | None:
        """The message of an RPC; None if there is none. Raises `QueueFull`.

        Nearly all are there at once. Of those that are not, few may be on their way, and not for long.
        """
        reading = _Reading(context, asyncio.current_task())
        self._reading.add(reading)
        if not self._is_looking:
            self._is_looking = True
            asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)
        try:
            message: object = await context.read()
        except asyncio.CancelledError:
            if not reading.refusal or (reading.task and reading.task.uncancel()):
                raise  # the caller went away
            raise QueueFull(reading.refusal, _RETRY_SECONDS) from None
        finally:
            self._reading.discard(reading)
            if reading.is_slow:
                self._add(context.peer(), slow_reads=-1)
        return message if isinstance(message, bytes) else None  # else it is `aio.EOF`

    def _look(self) -> None:
        self._is_looking = bool(self._reading)
        for reading in self._reading:
            reading.looks += 1
            if reading.looks == _SLOW_LOOKS:
                self._judge(reading)
            elif reading.looks == _MOST_LOOKS:
                self._end(reading, "the request took too long to arrive")
        if self._is_looking:
            asyncio.get_running_loop().call_later(_LOOK_SECONDS, self._look)

    def _judge(self, reading: _Reading) -> None:
        peer = reading.context.peer()
        known = self._connections.get(peer)
        if self._slow_reads >= _SLOW_READS or (known and known.slow_reads >= _SLOW_READS_OF_ONE):
            self._end(reading, "the request arrives slowly, and too many others do")
        else:
            reading.is_slow = True
            self._add(peer, slow_reads=1)

    @staticmethod
    def _end(reading: _Reading, refusal: str) -> None:
        reading.refusal = refusal
        if reading.task is not None:
            reading.task.cancel()

    @contextmanager
    def held(self, context: Context, size_bytes: int, *, pairs: int) -> Iterator[None]:
        """Count a request while it is worked on. Raises `QueueFull`; never for one that is alone."""
        size, peer = size_bytes + _PAIR_BYTES * pairs, context.peer()
        known = self._connections.get(peer)
        of_one, of_all = (known.held_bytes if known else 0) + size, self._held_bytes + size
        if (of_one > max(size, self.limits.one_bytes)) or (
            of_all > max(size, self.limits.all_bytes) and of_one > self.limits.small_bytes
        ):
            text = f"{of_one - size} bytes of requests and unread answers are held for this connection"
            raise QueueFull(text, _RETRY_SECONDS)
        self._add(peer, held_bytes=size)
        try:
            yield
        finally:
            self._add(peer, held_bytes=-size)

    def hold_until_sent(self, context: Context, size_bytes: int) -> None:
        """Count an answer until its caller has read it, or is gone. Of small ones, streams are the bound."""
        if size_bytes <= _SMALL_ANSWER_BYTES:
            return
        peer = context.peer()
        self._add(peer, held_bytes=size_bytes)
        context.add_done_callback(
            lambda _: self._add(peer, held_bytes=-size_bytes)  # type: ignore[arg-type]
        )

    def _add(self, peer: str, *, held_bytes: int = 0, slow_reads: int = 0) -> None:
        one = self._connections.setdefault(peer, _Connection())
        one.held_bytes += held_bytes
        one.slow_reads += slow_reads
        self._held_bytes += held_bytes
        self._slow_reads += slow_reads
        if not one.held_bytes and not one.slow_reads:
            del self._connections[peer]
