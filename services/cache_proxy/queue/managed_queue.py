"""Builds the queue: one of this process alone, or, with a Redis that replicas share, the one of all."""

import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from services.cache_proxy.errors import PairError, QueueFormatError, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.advertised_address import AdvertisedAddress
from services.cache_proxy.queue.failover import FailoverQueue
from services.cache_proxy.queue.interface import GiveUp, Queue, QueueLimits, Settle
from services.cache_proxy.queue.local.call_limiter import Limiter
from services.cache_proxy.queue.local.gcra import PACE
from services.cache_proxy.queue.local.local_queue import LocalQueue
from services.cache_proxy.queue.queue_scripts import Keys, Scripts
from services.cache_proxy.queue.quotas import QuotasNow, none
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.replica_session import Hear, Listener
from services.cache_proxy.queue.snapshot import Overview, Reporter
from services.cache_proxy.queue.time_slots import SlotLimiter
from services.cache_proxy.redis_client.access_check import AccessCheck
from services.cache_proxy.redis_client.client_factory import Client
from services.cache_proxy.redis_client.node import Home
from services.cache_proxy.redis_client.values import read_number

_log = logging.getLogger(__name__)

# Of `QueueLimits.paced`, in its order; and what it is of the setting.
_LIMITS = (("pairs/s", PACE), ("calls/s", PACE), ("pairs a batch", 1))


class ProxyQueue(Queue, Protocol):
    """A queue that can be told that answers are invalidated, and that the process ends."""

    last_loss: tuple[str, float] | None
    """Why what is shared could not be reached, and when, on time.monotonic."""

    @property
    def lost(self) -> bool:
        """Whether it is shared, and what is shared cannot be reached."""

    refusal: StoreError | None
    """Why this replica may not use a Redis that answers; None while it may."""

    async def admitted(self) -> None:
        """Return at once, but where Redis refuses this replica what it needs: once that was mended."""

    def discard(self, digest: bytes) -> None:
        """Remember no answer of this pair's that came of late: it was invalidated."""

    def discard_all(self) -> None:
        """Remember no answer."""

    def end_all(self, error: PairError) -> None:
        """End every pair with `error`."""

    async def overview(self, *, minutes: int) -> Overview:
        """How it stands, with the reports of so many minutes if it is shared. Raises `StoreError`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedRedis:
    """A Redis that replicas share, and what this one needs in it."""

    client: Client
    url: str
    keys: Keys
    expected_replicas: int
    lease_seconds: float
    http_bound: str
    user: str = "default"
    store_key: str = ""
    """A key of the cache, with the hash tag of some of them."""
    logs: Mapping[str, Hear] = field(default_factory=dict)
    """Keys of the logs of invalidations, and who is to be told their last entries."""
    reporter: Reporter | None = None
    """Of what the status page tells of this replica."""


def open_local(
    limits: QueueLimits, *, settle: Settle, metrics: ProxyMetrics, expected_replicas: int = 1,
    quotas: QuotasNow = none, give_up: GiveUp = lambda *_: None,
) -> LocalQueue:  # fmt: skip
    """The queue of a process that shares nothing, so keeps to its share of the rate and of every quota."""
    limiter = _limiter(limits, replicas=expected_replicas)
    queue = LocalQueue(
        limits, limiter=limiter, settle=settle, metrics=metrics, replicas=lambda: expected_replicas,
        quotas=quotas, give_up=give_up,
    )  # fmt: skip
    queue.show_metrics()
    return queue


@asynccontextmanager
async def open_shared(
    limits: QueueLimits, shared: SharedRedis, *, replica: str, settle: Settle, metrics: ProxyMetrics,
    quotas: QuotasNow = none, give_up: GiveUp = lambda *_: None,
) -> AsyncIterator[ProxyQueue]:  # fmt: skip
    """The queue of all replicas, for as long as the block lasts. Redis need not be there yet."""
    home = Home(shared.client, key=shared.keys.limit, user=shared.user)
    scripts = Scripts(home, shared.keys, metrics=metrics)
    limiter = SlotLimiter(_limiter(limits, replicas=shared.expected_replicas))
    asked = RedisQueue(
        scripts, replica=replica, limits=limits, lease_seconds=shared.lease_seconds, settle=settle,
        metrics=metrics, quotas=quotas, give_up=give_up,
    )  # fmt: skip
    local = LocalQueue(
        limits, limiter=limiter, settle=lambda digest, outcome: asked.end({digest: outcome}), metrics=metrics,
        replicas=lambda: limiter.replicas or shared.expected_replicas, quotas=quotas, give_up=give_up,
    )  # fmt: skip
    queue = FailoverQueue(shared=asked, local=local, limiter=limiter)
    access = AccessCheck(
        home=home, keys=[shared.keys.limit, *shared.keys.bases, shared.store_key],
        channel=scripts.channel, user=shared.user,
    )  # fmt: skip

    is_configured = False

    async def join() -> None:
        nonlocal is_configured
        await access.run()
        if not is_configured:  # once: a replica that started later has its limits there since
            is_configured = await _configure(scripts, limits, metrics)

    try:
        await join()
    except StoreError as error:
        await queue.lose(error)
    listener = Listener(
        home, scripts, queue=queue, shared=asked,
        find_address=AdvertisedAddress(http_bound=shared.http_bound, redis_url=shared.url).find,
        limits=limits, metrics=metrics,
        logs=shared.logs, reporter=shared.reporter, check_access=join,
    )  # fmt: skip
    await listener.start()
    try:
        yield queue
    finally:
        await listener.stop()
        await home.close()


def new_replica() -> str:
    """A name that no other replica has."""
    return secrets.token_hex(8)


def _limiter(limits: QueueLimits, *, replicas: int) -> Limiter:
    return Limiter(
        pairs_per_second=limits.pairs_per_second / replicas,
        calls_per_second=limits.calls_per_second / replicas,
        burst=limits.batch_pairs,
        now=time.monotonic(),
    )


async def _configure(scripts: Scripts, limits: QueueLimits, metrics: ProxyMetrics) -> bool:
    """Make this replica's limits the deployment's, as the newest start's count. Return whether it did."""
    mine = limits.paced
    try:
        before = await scripts.run("configure", list(mine))
    except QueueFormatError:
        raise
    except StoreError:
        return False  # the heartbeat will say that Redis is not there
    changes = []
    for (name, pace), found, own in zip(_LIMITS, before, mine, strict=True):
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
