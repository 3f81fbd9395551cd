"""The queue as the settings want it: shared where Redis is, with its limits and quotas."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import redis.asyncio

from services.cache_proxy.auth.reloader import Renewals
from services.cache_proxy.cache.buckets import state_key
from services.cache_proxy.cache.namespace import base_key
from services.cache_proxy.config.settings import Settings
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue import quotas
from services.cache_proxy.queue.interface import GiveUp, QueueLimits, Settle
from services.cache_proxy.queue.managed_queue import ProxyQueue, SharedRedis, open_local, open_shared
from services.cache_proxy.queue.queue_scripts import Keys
from services.cache_proxy.queue.quotas import QuotasNow
from services.cache_proxy.queue.replica_session import Hear
from services.cache_proxy.queue.snapshot import Reporter
from services.cache_proxy.redis_client.client_factory import user_of
from services.common.file_reload import Renewed


@asynccontextmanager
async def open_queue(  # noqa: PLR0913 - each is a part of its own
    settings: Settings, client: "redis.asyncio.Redis | None", *, replica: str, http_bound: str,
    settle: Settle, give_up: GiveUp, metrics: ProxyMetrics, logs: Mapping[str, Hear], reporter: Reporter,
    quotas_now: QuotasNow,
) -> AsyncIterator[ProxyQueue]:  # fmt: skip
    """The queue of all replicas, or without `client` this process's own."""
    limits, share = _limits(settings), settings.model.expected_replicas
    metrics.show_limits(
        calls_per_second=limits.calls_per_second,
        pairs_per_second=limits.pairs_per_second,
        batch_pairs=limits.batch_pairs,
        queued_pairs=limits.max_pairs,
    )
    if client is None:
        yield open_local(
            limits, expected_replicas=share, settle=settle, give_up=give_up, metrics=metrics,
            quotas=quotas_now,
        )  # fmt: skip
        return
    shared = SharedRedis(
        client=client,
        url=settings.cache.cache_url,
        keys=Keys(
            prefix=settings.key.key_prefix,
            namespace=settings.key.namespace,
            model_target=settings.model.model_target,
        ),
        expected_replicas=share,
        lease_seconds=settings.model.model_deadline_seconds,
        http_bound=http_bound,
        user=user_of(settings.cache),
        store_key=state_key(base_key(settings.key), 0),
        logs=logs,
        reporter=reporter,
    )
    async with open_shared(
        limits, shared, replica=replica, settle=settle, give_up=give_up, metrics=metrics, quotas=quotas_now
    ) as queue:
        yield queue


def follow_quotas(settings: Settings, renewals: Renewals) -> QuotasNow:
    """The quotas of the file as it is just now. Raises UsageError."""
    path = settings.server.caller_quotas_file
    if path is None:
        return quotas.none
    followed = Renewed([path], partial(quotas.read_quotas, path), tell=renewals.teller("caller_quotas"))
    renewals.add(followed.look)
    return lambda: followed.value


def _limits(settings: Settings) -> QueueLimits:
    model = settings.model
    return QueueLimits(
        batch_pairs=model.model_batch_size,
        batch_bytes=model.model_batch_bytes,
        pairs_per_second=model.model_rate,
        calls_per_second=model.model_calls_per_second,
        linger_seconds=model.linger_seconds,
        max_pairs=settings.server.max_queued_pairs,
        max_bytes=settings.server.max_queued_bytes,
        retry_window_seconds=model.model_retry_window_seconds,
    )
