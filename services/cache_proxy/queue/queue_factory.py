"""Opens the queue that the settings describe: shared if the cache is a Redis, with its limits and quotas."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import redis.asyncio

from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.config.settings import Settings
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue import quotas
from services.cache_proxy.queue.interface import ModelBackoffCallback, OutcomeCallback, QueueLimits
from services.cache_proxy.queue.managed_queue import (
    ManagedQueue,
    SharedQueueConfig,
    create_local_queue,
    open_shared_queue,
)
from services.cache_proxy.queue.quotas import QuotaProvider
from services.cache_proxy.queue.replica_session import LogTailCallback
from services.cache_proxy.queue.snapshot import ReportSource
from services.cache_proxy.redis_client.client_factory import acl_user
from services.cache_proxy.redis_keys import CacheKeys, QueueKeys
from services.common.file_reload import ReloadingFile


@asynccontextmanager
async def open_queue(  # noqa: PLR0913 - collaborators, all by keyword
    settings: Settings,
    client: "redis.asyncio.Redis | None",
    *,
    replica: str,
    http_bound: str,
    on_outcome: OutcomeCallback,
    on_model_backoff: ModelBackoffCallback,
    metrics: ProxyMetrics,
    log_callbacks: Mapping[str, LogTailCallback],
    report_source: ReportSource,
    quota_provider: QuotaProvider,
) -> AsyncIterator[ManagedQueue]:
    """Open the queue of all replicas, or without `client` one of this process alone."""
    limits = _queue_limits(settings)
    expected_replicas = settings.model.expected_replicas
    metrics.set_limit_gauges(
        calls_per_second=limits.calls_per_second,
        pairs_per_second=limits.pairs_per_second,
        batch_pairs=limits.batch_pairs,
        queued_pairs=limits.max_pairs,
    )
    if client is None:
        yield create_local_queue(
            limits,
            expected_replicas=expected_replicas,
            on_outcome=on_outcome,
            on_model_backoff=on_model_backoff,
            metrics=metrics,
            quotas=quota_provider,
        )
        return
    config = SharedQueueConfig(
        client=client,
        url=settings.cache.cache_url,
        keys=QueueKeys(
            prefix=settings.key.key_prefix,
            namespace=settings.key.namespace,
            model_target=settings.model.model_target,
        ),
        expected_replicas=expected_replicas,
        lease_seconds=settings.model.model_deadline_seconds,
        http_bound=http_bound,
        user=acl_user(settings.cache),
        store_key=CacheKeys(prefix=settings.key.key_prefix, namespace=settings.key.namespace).tag_state(0),
        log_callbacks=log_callbacks,
        report_source=report_source,
    )
    async with open_shared_queue(
        limits,
        config,
        replica=replica,
        on_outcome=on_outcome,
        on_model_backoff=on_model_backoff,
        metrics=metrics,
        quotas=quota_provider,
    ) as queue:
        yield queue


def watch_quotas(settings: Settings, reloader: FileReloader) -> QuotaProvider:
    """Return a provider of the quotas in the quota file, which is read again when it changes.

    Raises `UsageError`.
    """
    path = settings.server.caller_quotas_file
    if path is None:
        return quotas.no_quotas
    quota_file = ReloadingFile(
        [path], partial(quotas.read_quotas, path), on_reload=reloader.on_reload("caller_quotas")
    )
    reloader.add(quota_file.reload_if_changed)
    return lambda: quota_file.value


def _queue_limits(settings: Settings) -> QueueLimits:
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
