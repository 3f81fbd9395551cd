"""Keeps a replica in touch: what is published, and a heartbeat that tells what is held and was missed."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio.client import PubSub

from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import LANES, ProxyMetrics
from services.cache_proxy.queue.failover import FailoverQueue
from services.cache_proxy.queue.interface import QueueLimits
from services.cache_proxy.queue.peer_probe import Doors
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.serialization import pack, unpack
from services.cache_proxy.queue.snapshot import Reporter
from services.cache_proxy.queue.time_slots import Membership
from services.cache_proxy.redis_client.backend import FAILURES
from services.cache_proxy.redis_client.eviction_policy import EvictionWatch
from services.cache_proxy.redis_client.node import Home
from services.common.supervision import supervise
from services.common.tasks import end

_log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 0.3
_ASK_AGAIN_SECONDS = 15.0  # whatever else may have been lost
_RECONNECT_SECONDS = 0.2
_DEAF_SECONDS = 1.0
_SILENT_SECONDS = 5.0
_STANDBY_QUIET_SECONDS = 1.2  # after which the others take a member for silent, and leave its moments alone
_UNSEEN_BEATS = 2  # the first may have been on its way when the subscription was
Hear = Callable[[bytes | None], Awaitable[None]]
"""Told the last entry of a log, None if it has none."""

_REFUSED_SECONDS, _MAX_REFUSED_SECONDS = 1.0, 15.0  # between checks of what Redis refuses this replica


async def _no_check() -> None:
    """For a queue that needs no rights."""


_MILLISECOND = 0.001  # Redis's clock is told in whole ones


@dataclass(slots=True)
class _Heard:
    """`published` of the last message, and of the heartbeat before this one; the queue's own id; Redis's
    clock less time.monotonic.
    """  # noqa: D205 - one thought

    number: int = 0
    number_then: int = 0
    queue_id: bytes = b""
    clock_offset_seconds: float | None = None
    deaf: bool = False  # something was published, and nothing came since
    unseen_beats: int = 0  # in a row, that reached a server which knows of no subscription of this replica's


@dataclass(frozen=True, slots=True)
class _Pulse:
    """What a heartbeat brings (see `heartbeat.lua`)."""

    now_ms: int
    published: int
    queue_id: bytes
    waiting: Sequence[int]
    oldest_ms: float
    members: tuple[str, ...]
    late: Sequence[tuple[str, str]]
    moment_ms: float
    subscribed: int
    logs: Sequence[bytes | None]
    run: str
    held_back: int
    garbage: Sequence[str]

    @classmethod
    def read(cls, reply: Any) -> "_Pulse":
        """Raises `StoreError` if it is none."""
        try:
            (
                now_ms, published, queue_id, waiting, oldest_ms, members, late, moment_ms, subscribed,
                logs, run, held_back, garbage,
            ) = reply  # fmt: skip
            return cls(
                int(now_ms), int(published), bytes(queue_id), [int(count) for count in waiting],
                float(oldest_ms), tuple(members.decode("ascii", "replace").split(",")),
                [(replica.decode("ascii", "replace"), address.decode("ascii", "replace"))
                 for replica, address in late],
                float(moment_ms), int(subscribed),
                [last if isinstance(last, bytes) else None for last in logs], run.decode("ascii", "replace"),
                int(held_back), [name.decode("ascii", "replace") for name in garbage],
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError) as error:
            message = "the heartbeat's reply cannot be read"
            raise StoreError(message) from error


@dataclass(frozen=True, slots=True)
class _StandbyReply:
    """What a heartbeat of a replica that stands by brings (see `standby.lua`)."""

    other_format: int
    now_ms: int
    members: tuple[str, ...]
    moment_ms: float
    heard_ms_ago: float
    logs: Sequence[bytes | None]

    @classmethod
    def read(cls, reply: Any) -> "_StandbyReply | None":
        """Return None if the shared queue has this replica's format. Raise `StoreError` for no reply."""
        try:
            joins, *rest = reply
            if joins:
                return None
            other_format, now_ms, members, moment_ms, heard_ms_ago, logs = rest
            return cls(
                int(other_format), int(now_ms), tuple(members.decode("ascii", "replace").split(",")),
                float(moment_ms), float(heard_ms_ago),
                [last if isinstance(last, bytes) else None for last in logs],
            )  # fmt: skip
        except (ValueError, TypeError, AttributeError) as error:
            message = "the heartbeat's reply cannot be read"
            raise StoreError(message) from error


class Listener:
    """Asks everything again when messages may have been missed; that changes nothing if none was.

    State: `_heard`; `_address`, where other replicas reach this one, None until it is looked up: again after
    an outage, when names may resolve that did not before. Event loop only. A gap in the numbers, another
    queue's id or a new subscription mean that something may have been missed.
    """

    def __init__(  # noqa: PLR0913 - each is a part of its own
        self, home: Home, scripts: Scripts, *, queue: FailoverQueue, shared: RedisQueue,
        find_address: Callable[[], Awaitable[str]], limits: QueueLimits, metrics: ProxyMetrics,
        logs: Mapping[str, Hear], reporter: Reporter | None = None,
        check_access: Callable[[], Awaitable[None]] = _no_check,
    ) -> None:  # fmt: skip
        self._check_access = check_access
        self._refusals = 0  # since Redis last refused nothing for a minute
        self._refused_at = -math.inf
        self._home = home
        self._scripts = scripts
        self._channels = (scripts.channel, f"{scripts.channel}:{shared.replica}")
        self._queue = queue
        self._shared = shared
        self._replica = shared.replica
        self._find_address = find_address
        self._address: str | None = None
        self._limits = limits.paced
        self._metrics = metrics
        self._logs = logs
        self._reporter = reporter
        self._heard = _Heard()
        self._missed = asyncio.Event()
        self._doors = Doors(scripts)
        self._eviction = EvictionWatch(home, metrics=metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to listen. It does not wait for Redis to be there."""
        for work in (self._listen, self._beat, self._heal):
            self._tasks.append(asyncio.create_task(supervise(work, what="keeping in touch with the queue")))

    async def stop(self) -> None:
        """Say goodbye and stop."""
        await end(self._tasks)
        await self._doors.close()
        with contextlib.suppress(StoreError):
            if self._queue.stands_by:
                await self._run_standby(ends=True)
            else:
                await self._scripts.run("verdict", [self._replica, "gone", 0])

    async def _listen(self) -> None:
        while True:
            try:
                async with await self._home.subscription() as pubsub:
                    await pubsub.subscribe(*self._channels)
                    self._missed.set()
                    await self._eviction.look()
                    self._heard.deaf, self._heard.unseen_beats = False, 0
                    while self._heard.unseen_beats < _UNSEEN_BEATS and await self._hears(pubsub):
                        pass
            except FAILURES:
                await asyncio.sleep(_RECONNECT_SECONDS)

    async def _hears(self, pubsub: PubSub) -> bool:
        """Take what comes next, if anything does; whether the subscription is still good for something."""
        message = await pubsub.get_message(timeout=_DEAF_SECONDS)
        if message is None:
            return not self._heard.deaf  # the connection is dead, though nobody said so
        self._heard.deaf = False
        self._take(message["data"])
        return True

    def _take(self, data: Any) -> None:
        try:
            number, levels, errors, all_error, queue_id, *pause = unpack(data)
            if queue_id != self._heard.queue_id:
                # Of another queue, or of this one since it was lost and made again: the next heartbeat says
                # which. Until then nothing of it is believed, and what waits is asked for again.
                self._missed.set()
                return
            if number > self._heard.number + 1 and self._heard.number:
                self._missed.set()
            self._heard.number = max(self._heard.number, number)
            self._shared.published(levels, errors, all_error, *pause)
        except (StoreError, ValueError, TypeError, IndexError):
            self._metrics.store_garbage.inc()
            self._missed.set()

    async def _beat(self) -> None:
        while True:
            try:
                if not self._queue.stands_by or await self._may_join():
                    if self._queue.lost:  # whatever is there now may have other rights than what was lost
                        if self._queue.refusal is not None:
                            await asyncio.sleep(self._refused_pause_seconds())
                        await self._check_access()
                        self._queue.admit()
                    await self._beat_once()
            except StoreError as error:
                await self._queue.lose(error)
                self._queue.show_alone()
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    def _refused_pause_seconds(self) -> float:
        """Return how long to leave Redis alone: longer, the sooner it refused something again."""
        now = time.monotonic()
        self._refusals = 0 if now - self._refused_at > 2 * _MAX_REFUSED_SECONDS else self._refusals + 1
        self._refused_at = now
        return min(_MAX_REFUSED_SECONDS, _REFUSED_SECONDS * 1.5 ** min(self._refusals, 20))

    async def _may_join(self) -> bool:
        """Return whether the shared queue has this replica's format now; else learn its moments."""
        asked_at = time.monotonic()
        reply = _StandbyReply.read(unpack(await self._run_standby()))
        if reply is None:
            return True
        replied_at = time.monotonic()
        membership = Membership(
            replica=self._replica,
            members=reply.members,
            moment_seconds=reply.moment_ms / 1000,
            clock_offset_seconds=self._clock_offset(reply.now_ms / 1000, asked_at, replied_at),
        )
        silent_at = replied_at - reply.heard_ms_ago / 1000 + _STANDBY_QUIET_SECONDS
        self._queue.stand_by(membership, begins_at=silent_at)
        self._queue.show_alone()
        for hear, last in zip(self._logs.values(), reply.logs, strict=False):
            await hear(last)
        return False

    async def _run_standby(self, *, ends: bool = False) -> Any:
        if self._address is None:
            self._address = await self._find_address()
        arguments = [self._replica, self._address, *self._limits, pack(list(self._logs)), int(ends)]
        return await self._scripts.run("standby", arguments)

    async def _beat_once(self) -> None:
        if self._address is None:
            self._address = await self._find_address()
        lost, asked_at = self._queue.lost, time.monotonic()
        reports = self._reporter.due() if self._reporter else []
        arguments = [
            self._replica, pack(self._shared.held), self._address, int(lost), *self._limits,
            pack(list(self._logs)), self._shared.run, pack(reports),
        ]  # fmt: skip
        pulse = _Pulse.read(unpack(await self._scripts.run("heartbeat", arguments)))
        clock_offset_seconds = self._clock_offset(pulse.now_ms / 1000, asked_at, time.monotonic())
        if pulse.garbage:
            self._metrics.store_garbage.inc(len(pulse.garbage))
            _log.warning(
                "values in Redis that could not be read were replaced by this replica's settings (%s)",
                ", ".join(sorted(set(pulse.garbage))),
            )
        if self._reporter:
            self._reporter.reported(reports, clock_offset_seconds=clock_offset_seconds)
        self._compare(pulse.queue_id, pulse.published)
        # If it has none, the queue has moved from where this replica listens: to another node or master.
        self._heard.unseen_beats = 0 if pulse.subscribed else self._heard.unseen_beats + 1
        self._queue.heard(
            Membership(
                replica=self._replica,
                members=pulse.members,
                moment_seconds=pulse.moment_ms / 1000,
                clock_offset_seconds=clock_offset_seconds,
            ),
            at=asked_at,
        )
        self._shared.run = pulse.run
        # Only now: from the heartbeat on, the others do not leave this replica's moments alone any more. And
        # before anything is told that may have been invalidated.
        for hear, last in zip(self._logs.values(), pulse.logs, strict=False):
            await hear(last)
        if lost:
            try:
                await self._queue.regain()
            except StoreError:  # heard, but not served: only a silent replica has moments of its own
                await asyncio.sleep(_SILENT_SECONDS)
                raise
            self._address = None
        for replica, address in pulse.late:
            self._doors.knock(replica, address)
        for priority, count in zip(LANES, pulse.waiting, strict=True):
            self._metrics.queue_global_pairs.labels(priority).set(count)
        self._metrics.quota_held.set(pulse.held_back)
        self._metrics.queue_oldest.set(pulse.oldest_ms / 1000)
        self._metrics.live_replicas.set(max(0, len(pulse.members) - len(pulse.late)))

    def _clock_offset(self, redis_now: float, asked_at: float, heard_at: float) -> float:
        """A reply bounds it, a slow one widely: what was known holds within the bounds."""
        least, most = redis_now - heard_at, redis_now + _MILLISECOND - asked_at
        known = self._heard.clock_offset_seconds
        offset = (least + most) / 2 if known is None else min(most, max(least, known))
        self._heard.clock_offset_seconds = offset
        return offset

    def _compare(self, queue_id: bytes, published: int) -> None:
        heard = self._heard
        if queue_id != heard.queue_id or published < heard.number_then:  # a failover lost some
            heard.queue_id, heard.number, heard.number_then = queue_id, published, published
            self._missed.set()
            if self._reporter:
                self._reporter.report_again()
        elif heard.number < heard.number_then:  # published a heartbeat ago, and not here yet
            heard.number = heard.number_then
            heard.deaf = True
            self._missed.set()
        heard.number_then = published

    async def _heal(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._missed.wait(), _ASK_AGAIN_SECONDS)
            self._missed.clear()
            if self._queue.lost:
                continue  # whoever finds Redis again asks for everything
            try:
                await self._shared.ask_again()
            except StoreError as error:
                await self._queue.lose(error)
