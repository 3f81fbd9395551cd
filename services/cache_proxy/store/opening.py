"""Opens the store that `--cache-url` names."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import redis.asyncio

from services.cache_proxy.config import DEFAULT_EMBEDDED_DIR, CacheSettings, KeySettings, read_secret, redact
from services.cache_proxy.metrics import ProxyMetrics
from services.cache_proxy.store import Store
from services.cache_proxy.store.connecting import Access, Client, connect, servers
from services.cache_proxy.store.deployment import base_key
from services.cache_proxy.store.embedded import EmbeddedServer
from services.cache_proxy.store.memory import MemoryStore
from services.cache_proxy.store.redis import RedisStore

_log = logging.getLogger(__name__)

_EMBEDDED_TIMEOUT_SECONDS = 2.0  # no network in between, but a folder on a slow disk


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """The store, and, if it is in a Redis that other replicas may share, the client that leads there."""

    store: Store
    shared: "redis.asyncio.Redis | None" = None


@asynccontextmanager
async def open_store(
    cache: CacheSettings, key: KeySettings, metrics: ProxyMetrics
) -> AsyncIterator[OpenedStore]:
    """The store, and for `embedded:` its server, for as long as the block lasts. Raises CommandError."""
    if cache.cache_url.startswith("memory:"):
        yield OpenedStore(MemoryStore())
        return
    async with open_client(cache) as client:
        store = RedisStore(servers(client), base=base_key(key), metrics=metrics)
        if cache.cache_url.startswith("embedded:"):
            yield OpenedStore(store)
        else:  # what the queue asks of a client, a Cluster's has too
            yield OpenedStore(store, cast("redis.asyncio.Redis", client))


@asynccontextmanager
async def open_client(cache: CacheSettings) -> AsyncIterator[Client]:
    """A client of the server that `--cache-url` names, and for `embedded:` the server too.

    Whoever is given the client closes it. Raises CommandError.
    """
    scheme, _, rest = cache.cache_url.partition(":")
    access = Access(
        username=cache.cache_username,
        password=read_secret(cache.cache_password_file, flag_name="--cache-password-file"),
        tls_ca=cache.cache_tls_ca,
    )
    if scheme != "embedded":
        client = connect(cache.cache_url, timeout_seconds=cache.cache_timeout_seconds, access=access)
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
