"""Open the store and the Redis client that `--cache-url` names."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import redis.asyncio

from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.cache.embedded import EmbeddedServer
from services.cache_proxy.cache.entry import FreshnessPolicy
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.memory_store import MemoryStore
from services.cache_proxy.cache.namespace import cache_keys, queue_keys
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.store import AnswerStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.cache.sweeper import Sweeper
from services.cache_proxy.cache.versioned_store import VersionedStore
from services.cache_proxy.config.cache_settings import (
    DEFAULT_EMBEDDED_DIR,
    AnswerSettings,
    CacheSettings,
    KeySettings,
)
from services.cache_proxy.config.cache_url import redact_url
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.client_factory import (
    RedisClient,
    RedisCredentials,
    backend_for,
    create_client,
)
from services.common.tasks import cancel_and_wait, restart_on_failure

_log = logging.getLogger(__name__)

# There is no network between, but the folder may be on a slow disk.
_EMBEDDED_TIMEOUT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class OpenStore:
    """An open store and what belongs to it.

    `shared_client` is the client of its Redis, None where no other replica can share that Redis. L1 must
    follow each of `invalidation_logs` by an `InvalidationFollower`.
    """

    store: AnswerStore
    shared_client: "redis.asyncio.Redis | None" = None
    invalidation_logs: Sequence[InvalidationLog] = ()
    clock: StoreClock = field(default_factory=StoreClock)


@asynccontextmanager
async def open_store(
    cache: CacheSettings,
    key_settings: KeySettings,
    metrics: ProxyMetrics,
    answers: AnswerSettings | None = None,
    reloader: FileReloader | None = None,
) -> AsyncIterator[OpenStore]:
    """Open the store for the duration of the block, and for `embedded:` its server. Raises CommandError."""
    if cache.cache_url.startswith("memory:"):
        yield OpenStore(MemoryStore())
        return
    answers = answers or AnswerSettings()
    async with open_client(cache, reloader) as client:
        backend = backend_for(client)
        clock = StoreClock()
        metrics.clock_difference_seconds.set_function(clock.difference_seconds)
        current = RedisStore(backend, base_key=cache_keys(key_settings).base, metrics=metrics, clock=clock)
        store: AnswerStore = current
        invalidation_logs = [InvalidationLog(backend, queue_keys(key_settings).invalidation_log)]
        if answers.previous_model_version is not None:
            previous = dataclasses.replace(key_settings, model_version=answers.previous_model_version)
            store = VersionedStore(
                current,
                RedisStore(backend, base_key=cache_keys(previous).base, metrics=metrics, clock=clock),
            )
            invalidation_logs.append(InvalidationLog(backend, queue_keys(previous).invalidation_log))
        freshness = FreshnessPolicy(answers.ttl_days, answers.serve_stale)
        try:
            sweeper = Sweeper(backend, current, key_settings=key_settings, freshness=freshness)
            async with _run_sweeper(sweeper):
                if cache.cache_url.startswith("embedded:"):
                    yield OpenStore(store, invalidation_logs=invalidation_logs, clock=clock)
                else:
                    # The queue uses only methods that the client of a Cluster has as well.
                    yield OpenStore(store, cast("redis.asyncio.Redis", client), invalidation_logs, clock)
        finally:
            # A second time: the sweeper may have reopened connections after the store was closed.
            await backend.close()


@asynccontextmanager
async def _run_sweeper(sweeper: Sweeper) -> AsyncIterator[None]:
    task = asyncio.create_task(restart_on_failure(sweeper.run, name="the store's housekeeping"))
    try:
        yield
    finally:
        await cancel_and_wait([task])


@asynccontextmanager
async def open_client(
    cache: CacheSettings, reloader: FileReloader | None = None
) -> AsyncIterator[RedisClient]:
    """Create a client for the server that `--cache-url` names; for `embedded:`, run that server too.

    The caller must close the client. Raises CommandError.
    """
    scheme, _, rest = cache.cache_url.partition(":")
    credentials = RedisCredentials(
        username=cache.cache_username,
        password_file=cache.cache_password_file,
        tls_ca=cache.cache_tls_ca,
        sentinel_username=cache.sentinel_username,
        sentinel_password_file=cache.sentinel_password_file,
    )
    if scheme != "embedded":
        client = create_client(
            cache.cache_url,
            timeout_seconds=cache.cache_timeout_seconds,
            credentials=credentials,
            reloader=reloader,
        )
        _log.info("the cache is at %s", redact_url(cache.cache_url))
        yield client
        return
    folder = rest or DEFAULT_EMBEDDED_DIR
    server = EmbeddedServer(Path(folder))
    started_at = time.monotonic()
    await server.start()
    try:
        _log.warning(
            "the cache is embedded: it and the limit on the model are this process's alone; "
            "replicas that share them need --cache-url redis://…",
            extra={"folder": folder, "seconds": round(time.monotonic() - started_at, 3)},
        )
        timeout_seconds = max(cache.cache_timeout_seconds, _EMBEDDED_TIMEOUT_SECONDS)
        yield create_client(server.url, timeout_seconds=timeout_seconds, credentials=credentials)
    finally:
        await server.stop()
