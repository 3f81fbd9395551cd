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

from services.cache_proxy.domain import PRIORITY_CLASSES
from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.failover import FailoverQueue
from services.cache_proxy.queue.interface import QueueLimits
from services.cache_proxy.queue.peer_probe import PeerProber
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.serialization import pack, unpack
from services.cache_proxy.queue.snapshot import ReportSource
from services.cache_proxy.queue.time_slots import Membership
from services.cache_proxy.redis_client.backend import CLIENT_ERRORS
from services.cache_proxy.redis_client.eviction_policy import EvictionPolicyCheck
from services.cache_proxy.redis_client.node import QueueNode
from services.common.tasks import cancel_and_wait, restart_on_failure

_log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 0.3
_RE_ENQUEUE_SECONDS = 15.0  # whatever else may have been lost
_RECONNECT_SECONDS = 0.2
_SUBSCRIPTION_TIMEOUT_SECONDS = 1.0
_FAIL_BACK_RETRY_SECONDS = 5.0
_STANDBY_QUIET_SECONDS = 1.2  # after which the others take a member for silent, and leave its moments alone
_MAX_MISSED_SUBSCRIPTIONS = 2  # the first may have been on its way when the subscription was
LogTailCallback = Callable[[bytes | None], Awaitable[None]]
"""Told the last entry of a log, None if it has none."""

_ACCESS_CHECK_SECONDS, _MAX_ACCESS_CHECK_SECONDS = (
    1.0,
    15.0,
)  # between checks of what Redis refuses this replica


async def _skip_access_check() -> None:
    """For a queue that needs no rights."""


_CLOCK_RESOLUTION_SECONDS = 0.001  # Redis's clock is told in whole ones


@dataclass(slots=True)
class _SubscriptionState:
    """`published` of the last message, and of the heartbeat before this one; the queue's own id; Redis's
    clock less time.monotonic.
    """  # noqa: D205 - one thought

    sequence: int = 0
    previous_sequence: int = 0
    queue_id: bytes = b""
    clock_offset_seconds: float | None = None
    subscription_stale: bool = False  # something was published, and nothing came since
    missed_subscriptions: int = (
        0  # in a row, that reached a server which knows of no subscription of this replica's
    )


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """What a heartbeat brings (see `heartbeat.lua`)."""

    now_ms: int
    last_sequence: int
    queue_id: bytes
    waiting_pairs: Sequence[int]
    oldest_ms: float
    members: tuple[str, ...]
    silent_replicas: Sequence[tuple[str, str]]
    slot_interval_ms: float
    subscriptions: int
    last_log_entries: Sequence[bytes | None]
    server_run_id: str
    quota_held_pairs: int
    unreadable_values: Sequence[str]

    @classmethod
    def decode(cls, reply: Any) -> "HeartbeatReply":
        """Raises `StoreError` if it is none."""
        try:
            (
                now_ms,
                published,
                queue_id,
                waiting,
                oldest_ms,
                members,
                late,
                moment_ms,
                subscribed,
                logs,
                run,
                held_back,
                garbage,
            ) = reply
            return cls(
                int(now_ms),
                int(published),
                bytes(queue_id),
                [int(count) for count in waiting],
                float(oldest_ms),
                tuple(members.decode("ascii", "replace").split(",")),
                [
                    (replica.decode("ascii", "replace"), address.decode("ascii", "replace"))
                    for replica, address in late
                ],
                float(moment_ms),
                int(subscribed),
                [last if isinstance(last, bytes) else None for last in logs],
                run.decode("ascii", "replace"),
                int(held_back),
                [name.decode("ascii", "replace") for name in garbage],
            )
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
                int(other_format),
                int(now_ms),
                tuple(members.decode("ascii", "replace").split(",")),
                float(moment_ms),
                float(heard_ms_ago),
                [last if isinstance(last, bytes) else None for last in logs],
            )
        except (ValueError, TypeError, AttributeError) as error:
            message = "the heartbeat's reply cannot be read"
            raise StoreError(message) from error


class ReplicaSession:
    """Asks everything again when messages may have been missed; that changes nothing if none was.

    State: `_heard`; `_address`, where other replicas reach this one, None until it is looked up: again after
    an outage, when names may resolve that did not before. Event loop only. A gap in the numbers, another
    queue's id or a new subscription mean that something may have been missed.
    """

    def __init__(  # noqa: PLR0913 - each is a part of its own
        self,
        node: QueueNode,
        scripts: Scripts,
        *,
        queue: FailoverQueue,
        shared: RedisQueue,
        find_address: Callable[[], Awaitable[str]],
        limits: QueueLimits,
        metrics: ProxyMetrics,
        log_callbacks: Mapping[str, LogTailCallback],
        report_source: ReportSource | None = None,
        check_access: Callable[[], Awaitable[None]] = _skip_access_check,
    ) -> None:
        self._check_access = check_access
        self._access_errors = 0  # since Redis last refused nothing for a minute
        self._access_error_at = -math.inf
        self._node = node
        self._scripts = scripts
        self._channels = (scripts.channel, f"{scripts.channel}:{shared.replica}")
        self._queue = queue
        self._shared = shared
        self._replica = shared.replica
        self._find_address = find_address
        self._address: str | None = None
        self._limits = limits.paced_limits
        self._metrics = metrics
        self._log_callbacks = log_callbacks
        self._report_source = report_source
        self._subscription = _SubscriptionState()
        self._messages_missed = asyncio.Event()
        self._peer_prober = PeerProber(scripts)
        self._eviction_check = EvictionPolicyCheck(node, metrics=metrics)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to listen. It does not wait for Redis to be there."""
        for work in (self._subscribe_loop, self._heartbeat_loop, self._recover_loop):
            self._tasks.append(
                asyncio.create_task(restart_on_failure(work, name="keeping in touch with the queue"))
            )

    async def stop(self) -> None:
        """Say goodbye and stop."""
        await cancel_and_wait(self._tasks)
        await self._peer_prober.close()
        with contextlib.suppress(StoreError):
            if self._queue.stands_by:
                await self._run_standby(ends=True)
            else:
                await self._scripts.run("set_peer_state", [self._replica, "gone", 0])

    async def _subscribe_loop(self) -> None:
        while True:
            try:
                async with await self._node.create_pubsub() as pubsub:
                    await pubsub.subscribe(*self._channels)
                    self._messages_missed.set()
                    await self._eviction_check.check()
                    self._subscription.subscription_stale, self._subscription.missed_subscriptions = False, 0
                    while (
                        self._subscription.missed_subscriptions < _MAX_MISSED_SUBSCRIPTIONS
                        and await self._receive(pubsub)
                    ):
                        pass
            except CLIENT_ERRORS:
                await asyncio.sleep(_RECONNECT_SECONDS)

    async def _receive(self, pubsub: PubSub) -> bool:
        """Take what comes next, if anything does; whether the subscription is still good for something."""
        message = await pubsub.get_message(timeout=_SUBSCRIPTION_TIMEOUT_SECONDS)
        if message is None:
            return not self._subscription.subscription_stale  # the connection is dead, though nobody said so
        self._subscription.subscription_stale = False
        self._apply_message(message["data"])
        return True

    def _apply_message(self, data: Any) -> None:
        try:
            number, levels, errors, all_error, queue_id, *pause = unpack(data)
            if queue_id != self._subscription.queue_id:
                # Of another queue, or of this one since it was lost and made again: the next heartbeat says
                # which. Until then nothing of it is believed, and what waits is asked for again.
                self._messages_missed.set()
                return
            if number > self._subscription.sequence + 1 and self._subscription.sequence:
                self._messages_missed.set()
            self._subscription.sequence = max(self._subscription.sequence, number)
            self._shared.apply_outcomes(levels, errors, all_error, *pause)
        except (StoreError, ValueError, TypeError, IndexError):
            self._metrics.store_garbage.inc()
            self._messages_missed.set()

    async def _heartbeat_loop(self) -> None:
        while True:
            try:
                if not self._queue.stands_by or await self._may_join():
                    if (
                        self._queue.is_redis_lost
                    ):  # whatever is there now may have other rights than what was lost
                        if self._queue.blocking_error is not None:
                            await asyncio.sleep(self._access_check_backoff_seconds())
                        await self._check_access()
                        self._queue.on_access_granted()
                    await self._heartbeat()
            except StoreError as error:
                await self._queue.fail_over(error)
                self._queue.show_local_metrics()
            await asyncio.sleep(_HEARTBEAT_SECONDS)

    def _access_check_backoff_seconds(self) -> float:
        """Return how long to leave Redis alone: longer, the sooner it refused something again."""
        now = time.monotonic()
        self._access_errors = (
            0 if now - self._access_error_at > 2 * _MAX_ACCESS_CHECK_SECONDS else self._access_errors + 1
        )
        self._access_error_at = now
        return min(_MAX_ACCESS_CHECK_SECONDS, _ACCESS_CHECK_SECONDS * 1.5 ** min(self._access_errors, 20))

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
            slot_interval_seconds=reply.moment_ms / 1000,
            clock_offset_seconds=self._update_clock_offset(reply.now_ms / 1000, asked_at, replied_at),
        )
        silent_at = replied_at - reply.heard_ms_ago / 1000 + _STANDBY_QUIET_SECONDS
        self._queue.stand_by(membership, begins_at=silent_at)
        self._queue.show_local_metrics()
        for hear, last in zip(self._log_callbacks.values(), reply.logs, strict=False):
            await hear(last)
        return False

    async def _run_standby(self, *, ends: bool = False) -> Any:
        if self._address is None:
            self._address = await self._find_address()
        arguments = [self._replica, self._address, *self._limits, pack(list(self._log_callbacks)), int(ends)]
        return await self._scripts.run("standby", arguments)

    async def _heartbeat(self) -> None:
        if self._address is None:
            self._address = await self._find_address()
        lost, asked_at = self._queue.is_redis_lost, time.monotonic()
        reports = self._report_source.pending_reports() if self._report_source else []
        arguments = [
            self._replica,
            pack(self._shared.claim_ids),
            self._address,
            int(lost),
            *self._limits,
            pack(list(self._log_callbacks)),
            self._shared.server_run_id,
            pack(reports),
        ]
        pulse = HeartbeatReply.decode(unpack(await self._scripts.run("heartbeat", arguments)))
        clock_offset_seconds = self._update_clock_offset(pulse.now_ms / 1000, asked_at, time.monotonic())
        if pulse.unreadable_values:
            self._metrics.store_garbage.inc(len(pulse.unreadable_values))
            _log.warning(
                "values in Redis that could not be read were replaced by this replica's settings (%s)",
                ", ".join(sorted(set(pulse.unreadable_values))),
            )
        if self._report_source:
            self._report_source.mark_reported(reports, clock_offset_seconds=clock_offset_seconds)
        self._detect_gap(pulse.queue_id, pulse.last_sequence)
        # If it has none, the queue has moved from where this replica listens: to another node or master.
        self._subscription.missed_subscriptions = (
            0 if pulse.subscriptions else self._subscription.missed_subscriptions + 1
        )
        self._queue.on_heartbeat(
            Membership(
                replica=self._replica,
                members=pulse.members,
                slot_interval_seconds=pulse.slot_interval_ms / 1000,
                clock_offset_seconds=clock_offset_seconds,
            ),
            received_after=asked_at,
        )
        self._shared.server_run_id = pulse.server_run_id
        # Only now: from the heartbeat on, the others do not leave this replica's moments alone any more. And
        # before anything is told that may have been invalidated.
        for hear, last in zip(self._log_callbacks.values(), pulse.last_log_entries, strict=False):
            await hear(last)
        if lost:
            try:
                await self._queue.fail_back()
            except StoreError:  # heard, but not served: only a silent replica has moments of its own
                await asyncio.sleep(_FAIL_BACK_RETRY_SECONDS)
                raise
            self._address = None
        for replica, address in pulse.silent_replicas:
            self._peer_prober.probe(replica, address)
        for priority, count in zip(PRIORITY_CLASSES, pulse.waiting_pairs, strict=True):
            self._metrics.queue_global_pairs.labels(priority).set(count)
        self._metrics.quota_held_pairs.set(pulse.quota_held_pairs)
        self._metrics.queue_oldest_seconds.set(pulse.oldest_ms / 1000)
        self._metrics.live_replicas.set(max(0, len(pulse.members) - len(pulse.silent_replicas)))

    def _update_clock_offset(self, redis_now: float, requested_at: float, received_at: float) -> float:
        """A reply bounds it, a slow one widely: what was known holds within the bounds."""
        least, most = redis_now - received_at, redis_now + _CLOCK_RESOLUTION_SECONDS - requested_at
        known = self._subscription.clock_offset_seconds
        offset = (least + most) / 2 if known is None else min(most, max(least, known))
        self._subscription.clock_offset_seconds = offset
        return offset

    def _detect_gap(self, queue_id: bytes, last_sequence: int) -> None:
        heard = self._subscription
        if queue_id != heard.queue_id or last_sequence < heard.previous_sequence:  # a failover lost some
            heard.queue_id, heard.sequence, heard.previous_sequence = queue_id, last_sequence, last_sequence
            self._messages_missed.set()
            if self._report_source:
                self._report_source.resend_all()
        elif heard.sequence < heard.previous_sequence:  # published a heartbeat ago, and not here yet
            heard.sequence = heard.previous_sequence
            heard.subscription_stale = True
            self._messages_missed.set()
        heard.previous_sequence = last_sequence

    async def _recover_loop(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._messages_missed.wait(), _RE_ENQUEUE_SECONDS)
            self._messages_missed.clear()
            if self._queue.is_redis_lost:
                continue  # whoever finds Redis again asks for everything
            try:
                await self._shared.re_enqueue()
            except StoreError as error:
                await self._queue.fail_over(error)
