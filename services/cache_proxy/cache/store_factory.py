"""Opens the store that `--cache-url` names."""

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
from services.cache_proxy.config.settings import (
    DEFAULT_EMBEDDED_DIR,
    AnswerSettings,
    CacheSettings,
    KeySettings,
    redact_url,
)
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.client_factory import (
    RedisClient,
    RedisCredentials,
    backend_for,
    create_client,
)
from services.common.tasks import cancel_and_wait, restart_on_failure

_log = logging.getLogger(__name__)

_EMBEDDED_TIMEOUT_SECONDS = 2.0  # no network in between, but a folder on a slow disk


@dataclass(frozen=True, slots=True)
class OpenStore:
    """The store, and, if it is in a Redis that other replicas may share, the client that leads there.

    `logs` tell what was invalidated: a `Follower` of each keeps L1 right.
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
    """The store, and for `embedded:` its server, for as long as the block lasts. Raises CommandError."""
    if cache.cache_url.startswith("memory:"):
        yield OpenStore(MemoryStore())
        return
    answers = answers or AnswerSettings()
    async with open_client(cache, reloader) as client:
        reached = backend_for(client)
        clock = StoreClock()
        metrics.clock_difference_seconds.set_function(clock.difference_seconds)
        current = RedisStore(reached, base_key=cache_keys(key_settings).base, metrics=metrics, clock=clock)
        store: AnswerStore = current
        logs = [InvalidationLog(reached, queue_keys(key_settings).invalidation_log)]
        if answers.previous_model_version is not None:
            previous = dataclasses.replace(key_settings, model_version=answers.previous_model_version)
            store = VersionedStore(
                current, RedisStore(reached, base_key=cache_keys(previous).base, metrics=metrics, clock=clock)
            )
            logs.append(InvalidationLog(reached, queue_keys(previous).invalidation_log))
        lifetime = FreshnessPolicy(answers.ttl_days, answers.serve_stale)
        try:
            async with _run_sweeper(Sweeper(reached, current, key_settings=key_settings, freshness=lifetime)):
                if cache.cache_url.startswith("embedded:"):
                    yield OpenStore(store, invalidation_logs=logs, clock=clock)
                else:  # what the queue asks of a client, a Cluster's has too
                    yield OpenStore(store, cast("redis.asyncio.Redis", client), logs, clock)
        finally:
            await reached.close()  # once more: the housekeeping may have used it since the store was closed


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
    """A client of the server that `--cache-url` names, and for `embedded:` the server too.

    Whoever is given the client closes it. Raises CommandError.
    """
    scheme, _, rest = cache.cache_url.partition(":")
    access = RedisCredentials(
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
            credentials=access,
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
        yield create_client(server.url, timeout_seconds=timeout_seconds, credentials=access)
    finally:
        await server.stop()
