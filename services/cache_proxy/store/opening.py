"""Opens the store that `--cache-url` names."""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import redis.asyncio

from services.cache_proxy.config import DEFAULT_EMBEDDED_DIR, CacheSettings, KeySettings, read_secret, redact
from services.cache_proxy.metrics import ProxyMetrics
from services.cache_proxy.store import Store
from services.cache_proxy.store.embedded import EmbeddedServer
from services.cache_proxy.store.memory import MemoryStore
from services.cache_proxy.store.redis import RedisStore, connect

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
    scheme, _, rest = cache.cache_url.partition(":")
    if scheme == "memory":
        yield OpenedStore(MemoryStore())
        return
    server = None
    url, timeout_seconds = cache.cache_url, cache.cache_timeout_seconds
    if scheme == "embedded":
        server = EmbeddedServer(Path(rest or DEFAULT_EMBEDDED_DIR))
        started_at = time.monotonic()
        await server.start()
        _log.warning(
            "the cache is embedded: it and the limit on the model are this process's alone; "
            "replicas that share them need --cache-url redis://…",
            extra={
                "folder": rest or DEFAULT_EMBEDDED_DIR,
                "seconds": round(time.monotonic() - started_at, 3),
            },
        )
        url, timeout_seconds = server.url, max(timeout_seconds, _EMBEDDED_TIMEOUT_SECONDS)
    try:
        password = read_secret(cache.cache_password_file, flag_name="--cache-password-file")
        client = connect(
            url,
            timeout_seconds=timeout_seconds,
            username=cache.cache_username,
            password=password,
            tls_ca=cache.cache_tls_ca,
        )
        if server is None:
            _log.info("the cache is at %s", redact(url))
        store = RedisStore(client, namespace=_namespace(key), metrics=metrics)
        yield OpenedStore(store, client if server is None else None)
    finally:
        if server is not None:
            await server.stop()


def _namespace(key: KeySettings) -> str:
    """The base of the namespace's keys: deployment, version of layout, then what `key.namespace` has."""
    return f"{key.key_prefix}:c1:{key.namespace}:"
