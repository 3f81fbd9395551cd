"""Builds the queue of one process, or of all replicas that share a Redis, and manages its life."""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from services.cache_proxy.domain import PACE
from services.cache_proxy.errors import PairError, QueueFormatError, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.advertised_address import AdvertisedAddress
from services.cache_proxy.queue.failover import FailoverQueue
from services.cache_proxy.queue.interface import ModelBackoffCallback, OutcomeCallback, Queue, QueueLimits
from services.cache_proxy.queue.local.call_limiter import RateLimiter
from services.cache_proxy.queue.local.local_queue import LocalQueue
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.quotas import QuotaProvider, no_quotas
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.replica_session import LogTailCallback, ReplicaSession
from services.cache_proxy.queue.snapshot import QueueSnapshot, ReportSource
from services.cache_proxy.queue.time_slots import TimeSlotLimiter
from services.cache_proxy.redis_client.access_check import AccessCheck
from services.cache_proxy.redis_client.client_factory import RedisClient
from services.cache_proxy.redis_client.node import QueueNode
from services.cache_proxy.redis_client.values import read_number
from services.cache_proxy.redis_keys import QueueKeys

_log = logging.getLogger(__name__)

# For each value of `QueueLimits.paced_limits`: its name, and what it is of the setting.
_LIMIT_NAMES_AND_PACE = (("pairs/s", PACE), ("calls/s", PACE), ("pairs a batch", 1))


class ManagedQueue(Queue, Protocol):
    """Queue of a running proxy: its health, invalidations, and the end of the process."""

    last_loss: tuple[str, float] | None
    """Why Redis was last lost, and when, on time.monotonic."""

    blocking_error: StoreError | None
    """Why this replica may not use the shared queue although Redis answers; None while it may."""

    @property
    def is_redis_lost(self) -> bool:
        """Return whether the queue is shared, but Redis cannot be used."""

    async def wait_for_access(self) -> None:
        """Return when Redis grants this replica all rights that it needs, at once if it does."""

    def discard(self, digest: bytes) -> None:
        """Forget a remembered outcome of this pair: it was invalidated."""

    def discard_all(self) -> None:
        """Forget all remembered outcomes."""

    def fail_all(self, error: PairError) -> None:
        """End every pair with the error."""

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:
        """Return the queue's state, with all replicas' reports of the last minutes. Raises `StoreError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedQueueConfig:
    """What a replica needs to share the queue in a Redis."""

    client: RedisClient
    url: str
    keys: QueueKeys
    expected_replicas: int
    lease_seconds: float
    http_bound: str
    user: str = "default"
    store_key: str = ""
    """A key of the cache, as an example for the access check."""
    log_callbacks: Mapping[str, LogTailCallback] = field(default_factory=dict)
    """What to call with the last entry of each invalidation log, by the log's key."""
    report_source: ReportSource | None = None
    """Where the reports of this replica for the status page come from."""


def create_local_queue(
    limits: QueueLimits,
    *,
    on_outcome: OutcomeCallback,
    metrics: ProxyMetrics,
    expected_replicas: int = 1,
    quotas: QuotaProvider = no_quotas,
    on_model_backoff: ModelBackoffCallback = lambda *_: None,
) -> LocalQueue:
    """Return the queue of a process that shares none: it keeps to its share of the rate and of each quota."""
    limiter = _create_limiter(limits, replicas=expected_replicas)
    queue = LocalQueue(
        limits,
        limiter=limiter,
        on_outcome=on_outcome,
        metrics=metrics,
        replicas=lambda: expected_replicas,
        quotas=quotas,
        on_model_backoff=on_model_backoff,
    )
    queue.register_gauges()
    return queue


@asynccontextmanager
async def open_shared_queue(
    limits: QueueLimits,
    config: SharedQueueConfig,
    *,
    replica: str,
    on_outcome: OutcomeCallback,
    metrics: ProxyMetrics,
    quotas: QuotaProvider = no_quotas,
    on_model_backoff: ModelBackoffCallback = lambda *_: None,
) -> AsyncIterator[ManagedQueue]:
    """Take part in the queue of all replicas for the length of the block.

    If Redis cannot be reached, the queue starts as a local one.
    """
    node = QueueNode(config.client, key=config.keys.limit, user=config.user)
    scripts = Scripts(node, config.keys, metrics=metrics)
    limiter = TimeSlotLimiter(_create_limiter(limits, replicas=config.expected_replicas))
    shared = RedisQueue(
        scripts,
        replica=replica,
        limits=limits,
        lease_seconds=config.lease_seconds,
        on_outcome=on_outcome,
        metrics=metrics,
        quotas=quotas,
        on_model_backoff=on_model_backoff,
    )
    # What ends in the local queue is resolved in the shared one's interest table: that has all waiting pairs.
    local = LocalQueue(
        limits,
        limiter=limiter,
        on_outcome=shared.interest.resolve,
        metrics=metrics,
        replicas=lambda: limiter.replicas or config.expected_replicas,
        quotas=quotas,
        on_model_backoff=on_model_backoff,
    )
    queue = FailoverQueue(shared=shared, local=local, limiter=limiter)
    access = AccessCheck(
        node=node,
        key_prefixes=[config.keys.limit, *config.keys.bases, config.store_key],
        channel=scripts.channel,
        user=config.user,
    )
    are_limits_published = False

    async def check_access() -> None:
        # The limits are published once: a replica that starts later replaces them with its own, and they must
        # not be overwritten when this one comes back to Redis.
        nonlocal are_limits_published
        await access.run()
        if not are_limits_published:
            are_limits_published = await _publish_limits(scripts, limits, metrics)

    try:
        await check_access()
    except StoreError as error:
        await queue.fail_over(error)
    session = ReplicaSession(
        node,
        scripts,
        queue=queue,
        shared=shared,
        find_address=AdvertisedAddress(http_bound=config.http_bound, redis_url=config.url).find,
        limits=limits,
        metrics=metrics,
        log_callbacks=config.log_callbacks,
        report_source=config.report_source,
        check_access=check_access,
    )
    await session.start()
    try:
        yield queue
    finally:
        await session.stop()
        await node.close()


def new_replica_id() -> str:
    """Return a random id for a replica."""
    return secrets.token_hex(8)


def _create_limiter(limits: QueueLimits, *, replicas: int) -> RateLimiter:
    return RateLimiter(
        pairs_per_second=limits.pairs_per_second / replicas,
        calls_per_second=limits.calls_per_second / replicas,
        burst=limits.batch_pairs,
        now=time.monotonic(),
    )


async def _publish_limits(scripts: Scripts, limits: QueueLimits, metrics: ProxyMetrics) -> bool:
    """Make this replica's limits those of the deployment: the limits of the last start count.

    Return whether Redis has them. Raises `QueueFormatError`.
    """
    own_values = limits.paced_limits
    try:
        values_before = await scripts.run("configure", list(own_values))
    except QueueFormatError:
        raise
    except StoreError:
        # The heartbeat will find that Redis is lost.
        return False
    changes = []
    for (name, pace), found, own in zip(_LIMIT_NAMES_AND_PACE, values_before, own_values, strict=True):
        known = read_number(found, minimum=0)
        if found is not None and known is None:
            metrics.store_garbage.inc()
            changes.append(f"{name} not a number -> {own / pace:g}")
        elif known is not None and known != own:
            changes.append(f"{name} {known / pace:g} -> {own / pace:g}")
    if changes:
        _log.warning(
            "rate limits in Redis differed from this replica's settings and were replaced (%s)",
            ", ".join(changes),
        )
    return True
