"""Receives what all replicas publish, and notices when messages may have been missed."""

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio.client import PubSub

from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.serialization import unpack
from services.cache_proxy.redis_client.backend import CLIENT_ERRORS
from services.cache_proxy.redis_client.eviction_policy import EvictionPolicyCheck
from services.cache_proxy.redis_client.node import QueueNode

_RECONNECT_SECONDS = 0.2
_MESSAGE_TIMEOUT_SECONDS = 1.0

# The first heartbeat may have been under way when the subscription was.
_MAX_MISSED_SUBSCRIPTIONS = 2


class MessageSubscription:
    """Subscription of one replica to the messages of the shared queue.

    Messages are numbered. A gap in the numbers, a message of another queue and a new subscription mean that
    messages may have been missed. Then `missed` is set, and all waiting pairs are to be enqueued again: that
    changes nothing if none was missed.

    State, touched only from the event loop:

    - `queue_id`: the id of the queue that the last heartbeat found.
    - `sequence`: the number of the last message that is known to be received or given up.
    - `_heartbeat_sequence`: the last number that the heartbeat before brought.
    - `_is_stale`: a heartbeat brought a number, and no message has come since. The connection may be dead.
    - `_missed_subscriptions`: consecutive heartbeats whose server knew no subscription of this replica.
    """

    def __init__(
        self, node: QueueNode, *, channels: Sequence[str], shared: RedisQueue, metrics: ProxyMetrics
    ) -> None:
        self._node = node
        self._channels = channels
        self._shared = shared
        self._metrics = metrics
        self._eviction_check = EvictionPolicyCheck(node, metrics=metrics)
        self.missed = asyncio.Event()
        self.queue_id = b""
        self.sequence = 0
        self._heartbeat_sequence = 0
        self._is_stale = False
        self._missed_subscriptions = 0

    async def run(self) -> None:
        """Receive messages until cancelled, over a new connection whenever the last one seems dead."""
        while True:
            try:
                async with await self._node.create_pubsub() as pubsub:
                    await pubsub.subscribe(*self._channels)
                    self.missed.set()
                    await self._eviction_check.check()
                    self._is_stale = False
                    self._missed_subscriptions = 0
                    while self._missed_subscriptions < _MAX_MISSED_SUBSCRIPTIONS:
                        if not await self._receive(pubsub):
                            break
            except CLIENT_ERRORS:
                await asyncio.sleep(_RECONNECT_SECONDS)

    async def _receive(self, pubsub: PubSub) -> bool:
        """Apply the next message, if one comes in time. Return whether the connection is still of use."""
        message = await pubsub.get_message(timeout=_MESSAGE_TIMEOUT_SECONDS)
        if message is None:
            return not self._is_stale
        self._is_stale = False
        self.apply_message(message["data"])
        return True

    def apply_message(self, data: Any) -> None:
        """Apply a published message, or count it if it cannot be read."""
        try:
            number, levels, errors, error_for_all, queue_id, *backoff = unpack(data)
            # The message is of another queue, or of this one after it was lost and made again. The next
            # heartbeat shows which. Until then it is not believed, and the waiting pairs are enqueued again.
            if queue_id != self.queue_id:
                self.missed.set()
                return
            if number > self.sequence + 1 and self.sequence:
                self.missed.set()
            self.sequence = max(self.sequence, number)
            self._shared.apply_outcomes(levels, errors, error_for_all, *backoff)
        except (StoreError, ValueError, TypeError, IndexError):
            self._metrics.store_garbage.inc()
            self.missed.set()

    def on_heartbeat(self, *, queue_id: bytes, last_sequence: int, subscriptions: int) -> bool:
        """Compare the messages that came with what a heartbeat found. Return whether the queue is a new one.

        A number that the heartbeat before brought should have come by now. A smaller one than then means that
        a Redis failover lost the last writes. If the server knows no subscription of this replica, the queue
        has moved to another node or master.
        """
        self._missed_subscriptions = 0 if subscriptions else self._missed_subscriptions + 1
        is_new = queue_id != self.queue_id or last_sequence < self._heartbeat_sequence
        if is_new:
            self.queue_id = queue_id
            self.sequence = last_sequence
            self.missed.set()
        elif self.sequence < self._heartbeat_sequence:
            self.sequence = self._heartbeat_sequence
            self._is_stale = True
            self.missed.set()
        self._heartbeat_sequence = last_sequence
        return is_new
