"""Keeps a replica a member of the shared queue: its heartbeat, its subscription, and what both bring.

The module has slightly more than 250 lines: all loops of the session are in one place.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from services.cache_proxy.domain import PRIORITY_CLASSES
from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.failover import FailoverQueue
from services.cache_proxy.queue.heartbeat import ClockOffset, HeartbeatReply, StandbyReply
from services.cache_proxy.queue.interface import QueueLimits
from services.cache_proxy.queue.peer_probe import PeerProber, PeerState
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.serialization import pack, unpack
from services.cache_proxy.queue.snapshot import ReportSource
from services.cache_proxy.queue.subscription import MessageSubscription
from services.cache_proxy.queue.time_slots import Membership
from services.cache_proxy.redis_client.node import QueueNode
from services.common.tasks import cancel_and_wait, restart_on_failure

_log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 0.3

# All waiting pairs are enqueued again this often, against losses that nothing else shows.
_RE_ENQUEUE_SECONDS = 15.0

# A replica whose heartbeats arrive but whose return fails sends none for so long: only a silent replica may
# call the model in slots of its own.
_FAIL_BACK_RETRY_SECONDS = 5.0

# After this time without a heartbeat the others take a member for silent, and leave its slots free.
_STANDBY_QUIET_SECONDS = 1.2

# Between checks of what Redis denies this replica.
_ACCESS_CHECK_SECONDS = 1.0
_MAX_ACCESS_CHECK_SECONDS = 15.0

LogTailCallback = Callable[[bytes | None], Awaitable[None]]
"""Called with the last entry of an invalidation log, None if the log is empty."""


async def _skip_access_check() -> None:
    """Check nothing, for a queue that needs no rights."""


class ReplicaSession:
    """Membership of one replica in the shared queue.

    State, touched only from the event loop:

    - `subscription`: the messages that came, and whether any may have been missed.
    - `_address`: where other replicas reach this one. None until it is looked up: at the start, and again
      after an outage, when names may resolve that did not before.
    - `_access_errors` and `_access_error_at`: consecutive checks in which Redis denied this replica
      something, and the time of the last one.
    """

    def __init__(  # noqa: PLR0913 - collaborators, all by keyword
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
        self._scripts = scripts
        self._queue = queue
        self._shared = shared
        self._replica = shared.replica
        self._find_address = find_address
        self._limits = limits.paced_limits
        self._metrics = metrics
        self._log_callbacks = log_callbacks
        self._report_source = report_source
        self._check_access = check_access
        self._address: str | None = None
        self._access_errors = 0
        self._access_error_at = -math.inf
        self._clock_offset = ClockOffset()
        self._peer_prober = PeerProber(scripts)
        self._tasks: list[asyncio.Task[None]] = []
        self.subscription = MessageSubscription(
            node,
            channels=(scripts.channel, f"{scripts.channel}:{shared.replica}"),
            shared=shared,
            metrics=metrics,
        )

    async def start(self) -> None:
        """Start the loops. Does not wait until Redis is reached."""
        for loop in (self.subscription.run, self._heartbeat_loop, self._recover_loop):
            task = restart_on_failure(loop, name="keeping in touch with the queue")
            self._tasks.append(asyncio.create_task(task))

    async def stop(self) -> None:
        """Stop the loops, and leave the membership."""
        await cancel_and_wait(self._tasks)
        await self._peer_prober.close()
        with contextlib.suppress(StoreError):
            if self._queue.is_on_standby:
                await self._run_standby(is_leaving=True)
            else:
                await self._scripts.run("set_peer_state", [self._replica, PeerState.GONE, 0])

    async def _heartbeat_loop(self) -> None:
        while True:
            try:
                if not self._queue.is_on_standby or await self._may_join():
                    # The Redis that is there now may grant other rights than the one that was lost.
                    if self._queue.is_redis_lost:
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
        """Return how long to leave Redis alone: longer, the sooner it denied something again."""
        now = time.monotonic()
        is_first = now - self._access_error_at > 2 * _MAX_ACCESS_CHECK_SECONDS
        self._access_errors = 0 if is_first else self._access_errors + 1
        self._access_error_at = now
        return min(_MAX_ACCESS_CHECK_SECONDS, _ACCESS_CHECK_SECONDS * 1.5 ** min(self._access_errors, 20))

    async def _may_join(self) -> bool:
        """Return whether the shared queue has this replica's format now. If not, update its slots."""
        requested_at = time.monotonic()
        reply = StandbyReply.decode(unpack(await self._run_standby()))
        if reply is None:
            return True
        received_at = time.monotonic()
        membership = Membership(
            replica=self._replica,
            members=reply.members,
            slot_interval_seconds=reply.slot_interval_ms / 1000,
            clock_offset_seconds=self._clock_offset.update(
                reply.now_ms / 1000, requested_at=requested_at, received_at=received_at
            ),
        )
        silent_at = received_at - reply.last_heartbeat_age_ms / 1000 + _STANDBY_QUIET_SECONDS
        self._queue.stand_by(membership, not_before=silent_at)
        self._queue.show_local_metrics()
        await self._follow_logs(reply.last_log_entries)
        return False

    async def _run_standby(self, *, is_leaving: bool = False) -> Any:
        log_keys = pack(list(self._log_callbacks))
        address = await self._own_address()
        arguments = [self._replica, address, *self._limits, log_keys, int(is_leaving)]
        return await self._scripts.run("standby", arguments)

    async def _heartbeat(self) -> None:
        """Send one heartbeat, and act on its reply."""
        address = await self._own_address()
        was_lost = self._queue.is_redis_lost
        requested_at = time.monotonic()
        reports = self._report_source.pending_reports() if self._report_source else []
        arguments = [
            self._replica,
            pack(self._shared.claims.ids),
            address,
            int(was_lost),
            *self._limits,
            pack(list(self._log_callbacks)),
            self._shared.claims.server_run_id,
            pack(reports),
        ]
        reply = HeartbeatReply.decode(unpack(await self._scripts.run("heartbeat", arguments)))
        clock_offset_seconds = self._clock_offset.update(
            reply.now_ms / 1000, requested_at=requested_at, received_at=time.monotonic()
        )
        self._report_unreadable(reply.unreadable_values)
        if self._report_source:
            self._report_source.mark_reported(reports, clock_offset_seconds=clock_offset_seconds)
        is_new_queue = self.subscription.on_heartbeat(
            queue_id=reply.queue_id,
            last_sequence=reply.last_sequence,
            subscriptions=reply.subscriptions,
        )
        if is_new_queue and self._report_source:
            self._report_source.resend_all()
        membership = Membership(
            replica=self._replica,
            members=reply.members,
            slot_interval_seconds=reply.slot_interval_ms / 1000,
            clock_offset_seconds=clock_offset_seconds,
        )
        self._queue.on_heartbeat(membership, received_after=requested_at)
        self._shared.claims.server_run_id = reply.server_run_id
        # The logs are followed only now: since the heartbeat the other replicas use this one's slots. And
        # before the return to the shared queue, so that no invalidated answer is published.
        await self._follow_logs(reply.last_log_entries)
        if was_lost:
            await self._fail_back()
        for replica, peer_address in reply.silent_replicas:
            self._peer_prober.probe(replica, peer_address)
        self._show_metrics(reply)

    async def _fail_back(self) -> None:
        """Return to the shared queue. Raises `StoreError`, after a pause in which this replica is silent."""
        try:
            await self._queue.fail_back()
        except StoreError:
            await asyncio.sleep(_FAIL_BACK_RETRY_SECONDS)
            raise
        self._address = None

    async def _follow_logs(self, last_entries: Sequence[bytes | None]) -> None:
        for callback, last_entry in zip(self._log_callbacks.values(), last_entries, strict=False):
            await callback(last_entry)

    async def _own_address(self) -> str:
        if self._address is None:
            self._address = await self._find_address()
        return self._address

    def _report_unreadable(self, names: Sequence[str]) -> None:
        if names:
            self._metrics.store_garbage.inc(len(names))
            _log.warning(
                "values in Redis that could not be read were replaced by this replica's settings (%s)",
                ", ".join(sorted(set(names))),
            )

    def _show_metrics(self, reply: HeartbeatReply) -> None:
        for priority, count in zip(PRIORITY_CLASSES, reply.waiting_pairs, strict=True):
            self._metrics.queue_global_pairs.labels(priority).set(count)
        self._metrics.quota_held_pairs.set(reply.quota_held_pairs)
        self._metrics.queue_oldest_seconds.set(reply.oldest_ms / 1000)
        self._metrics.live_replicas.set(max(0, len(reply.members) - len(reply.silent_replicas)))

    async def _recover_loop(self) -> None:
        """Enqueue all waiting pairs again when messages may have been missed, and every now and then."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.subscription.missed.wait(), _RE_ENQUEUE_SECONDS)
            self.subscription.missed.clear()
            # The return to the shared queue enqueues all of them anyway.
            if self._queue.is_redis_lost:
                continue
            try:
                await self._shared.re_enqueue()
            except StoreError as error:
                await self._queue.fail_over(error)
