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

from services.cache_proxy.auth.reloader import Renewals
from services.cache_proxy.cache.embedded import EmbeddedServer
from services.cache_proxy.cache.entry import Lifetime
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.memory_store import MemoryStore
from services.cache_proxy.cache.namespace import base_key, log_key
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.store import Store
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.cache.sweeper import Housekeeping
from services.cache_proxy.cache.versioned_store import VersionedStore
from services.cache_proxy.config.settings import (
    DEFAULT_EMBEDDED_DIR,
    AnswerSettings,
    CacheSettings,
    KeySettings,
    redact,
)
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.client_factory import Access, Client, connect, servers
from services.common.supervision import supervise
from services.common.tasks import end

_log = logging.getLogger(__name__)

_EMBEDDED_TIMEOUT_SECONDS = 2.0  # no network in between, but a folder on a slow disk


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """The store, and, if it is in a Redis that other replicas may share, the client that leads there.

    `logs` tell what was invalidated: a `Follower` of each keeps L1 right.
    """

    store: Store
    shared: "redis.asyncio.Redis | None" = None
    logs: Sequence[InvalidationLog] = ()
    clock: StoreClock = field(default_factory=StoreClock)


@asynccontextmanager
async def open_store(
    cache: CacheSettings,
    key: KeySettings,
    metrics: ProxyMetrics,
    answers: AnswerSettings | None = None,
    renewals: Renewals | None = None,
) -> AsyncIterator[OpenedStore]:
    """The store, and for `embedded:` its server, for as long as the block lasts. Raises CommandError."""
    if cache.cache_url.startswith("memory:"):
        yield OpenedStore(MemoryStore())
        return
    answers = answers or AnswerSettings()
    async with open_client(cache, renewals) as client:
        reached = servers(client)
        clock = StoreClock()
        metrics.clock_difference.set_function(clock.difference_seconds)
        current = RedisStore(reached, base=base_key(key), metrics=metrics, clock=clock)
        store: Store = current
        logs = [InvalidationLog(reached, log_key(key))]
        if answers.previous_model_version is not None:
            previous = dataclasses.replace(key, model_version=answers.previous_model_version)
            store = VersionedStore(
                current, RedisStore(reached, base=base_key(previous), metrics=metrics, clock=clock)
            )
            logs.append(InvalidationLog(reached, log_key(previous)))
        lifetime = Lifetime(answers.ttl_days, answers.serve_stale)
        try:
            async with _running(Housekeeping(reached, current, key=key, lifetime=lifetime)):
                if cache.cache_url.startswith("embedded:"):
                    yield OpenedStore(store, logs=logs, clock=clock)
                else:  # what the queue asks of a client, a Cluster's has too
                    yield OpenedStore(store, cast("redis.asyncio.Redis", client), logs, clock)
        finally:
            await reached.close()  # once more: the housekeeping may have used it since the store was closed


@asynccontextmanager
async def _running(housekeeping: Housekeeping) -> AsyncIterator[None]:
    task = asyncio.create_task(supervise(housekeeping.run, what="the store's housekeeping"))
    try:
        yield
    finally:
        await end([task])


@asynccontextmanager
async def open_client(cache: CacheSettings, renewals: Renewals | None = None) -> AsyncIterator[Client]:
    """A client of the server that `--cache-url` names, and for `embedded:` the server too.

    Whoever is given the client closes it. Raises CommandError.
    """
    scheme, _, rest = cache.cache_url.partition(":")
    access = Access(
        username=cache.cache_username,
        password_file=cache.cache_password_file,
        tls_ca=cache.cache_tls_ca,
        sentinel_username=cache.sentinel_username,
        sentinel_password_file=cache.sentinel_password_file,
    )
    if scheme != "embedded":
        client = connect(
            cache.cache_url, timeout_seconds=cache.cache_timeout_seconds, access=access, renewals=renewals
        )
        _log.info("the cache is at %s", redact(cache.cache_url))
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
        yield connect(server.url, timeout_seconds=timeout_seconds, access=access)
    finally:
        await server.stop()
