"""Builds the queue: one of this process alone, or, with a Redis that replicas share, the one of all."""

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

# Of `QueueLimits.paced`, in its order; and what it is of the setting.
_LIMIT_NAMES_AND_PACE = (("pairs/s", PACE), ("calls/s", PACE), ("pairs a batch", 1))


class ManagedQueue(Queue, Protocol):
    """A queue that can be told that answers are invalidated, and that the process ends."""

    last_loss: tuple[str, float] | None
    """Why what is shared could not be reached, and when, on time.monotonic."""

    @property
    def is_redis_lost(self) -> bool:
        """Whether it is shared, and what is shared cannot be reached."""

    blocking_error: StoreError | None
    """Why this replica may not use a Redis that answers; None while it may."""

    async def wait_for_access(self) -> None:
        """Return at once, but where Redis refuses this replica what it needs: once that was mended."""

    def discard(self, digest: bytes) -> None:
        """Remember no answer of this pair's that came of late: it was invalidated."""

    def discard_all(self) -> None:
        """Remember no answer."""

    def fail_all(self, error: PairError) -> None:
        """End every pair with `error`."""

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:
        """How it stands, with the reports of so many minutes if it is shared. Raises `StoreError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedQueueConfig:
    """A Redis that replicas share, and what this one needs in it."""

    client: RedisClient
    url: str
    keys: QueueKeys
    expected_replicas: int
    lease_seconds: float
    http_bound: str
    user: str = "default"
    store_key: str = ""
    """A key of the cache, with the hash tag of some of them."""
    log_callbacks: Mapping[str, LogTailCallback] = field(default_factory=dict)
    """Keys of the logs of invalidations, and who is to be told their last entries."""
    report_source: ReportSource | None = None
    """Of what the status page tells of this replica."""


def create_local_queue(
    limits: QueueLimits,
    *,
    on_outcome: OutcomeCallback,
    metrics: ProxyMetrics,
    expected_replicas: int = 1,
    quotas: QuotaProvider = no_quotas,
    on_model_backoff: ModelBackoffCallback = lambda *_: None,
) -> LocalQueue:
    """The queue of a process that shares nothing, so keeps to its share of the rate and of every quota."""
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
    shared: SharedQueueConfig,
    *,
    replica: str,
    on_outcome: OutcomeCallback,
    metrics: ProxyMetrics,
    quotas: QuotaProvider = no_quotas,
    on_model_backoff: ModelBackoffCallback = lambda *_: None,
) -> AsyncIterator[ManagedQueue]:
    """The queue of all replicas, for as long as the block lasts. Redis need not be there yet."""
    home = QueueNode(shared.client, key=shared.keys.limit, user=shared.user)
    scripts = Scripts(home, shared.keys, metrics=metrics)
    limiter = TimeSlotLimiter(_create_limiter(limits, replicas=shared.expected_replicas))
    asked = RedisQueue(
        scripts,
        replica=replica,
        limits=limits,
        lease_seconds=shared.lease_seconds,
        on_outcome=on_outcome,
        metrics=metrics,
        quotas=quotas,
        on_model_backoff=on_model_backoff,
    )
    local = LocalQueue(
        limits,
        limiter=limiter,
        on_outcome=lambda digest, outcome: asked.resolve({digest: outcome}),
        metrics=metrics,
        replicas=lambda: limiter.replicas or shared.expected_replicas,
        quotas=quotas,
        on_model_backoff=on_model_backoff,
    )
    queue = FailoverQueue(shared=asked, local=local, limiter=limiter)
    access = AccessCheck(
        node=home,
        key_prefixes=[shared.keys.limit, *shared.keys.bases, shared.store_key],
        channel=scripts.channel,
        user=shared.user,
    )

    is_configured = False

    async def join() -> None:
        nonlocal is_configured
        await access.run()
        if not is_configured:  # once: a replica that started later has its limits there since
            is_configured = await _publish_limits(scripts, limits, metrics)

    try:
        await join()
    except StoreError as error:
        await queue.fail_over(error)
    listener = ReplicaSession(
        home,
        scripts,
        queue=queue,
        shared=asked,
        find_address=AdvertisedAddress(http_bound=shared.http_bound, redis_url=shared.url).find,
        limits=limits,
        metrics=metrics,
        log_callbacks=shared.log_callbacks,
        report_source=shared.report_source,
        check_access=join,
    )
    await listener.start()
    try:
        yield queue
    finally:
        await listener.stop()
        await home.close()


def new_replica_id() -> str:
    """A name that no other replica has."""
    return secrets.token_hex(8)


def _create_limiter(limits: QueueLimits, *, replicas: int) -> RateLimiter:
    return RateLimiter(
        pairs_per_second=limits.pairs_per_second / replicas,
        calls_per_second=limits.calls_per_second / replicas,
        burst=limits.batch_pairs,
        now=time.monotonic(),
    )


async def _publish_limits(scripts: Scripts, limits: QueueLimits, metrics: ProxyMetrics) -> bool:
    """Make this replica's limits the deployment's, as the newest start's count. Return whether it did."""
    mine = limits.paced_limits
    try:
        before = await scripts.run("configure", list(mine))
    except QueueFormatError:
        raise
    except StoreError:
        return False  # the heartbeat will say that Redis is not there
    changes = []
    for (name, pace), found, own in zip(_LIMIT_NAMES_AND_PACE, before, mine, strict=True):
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
