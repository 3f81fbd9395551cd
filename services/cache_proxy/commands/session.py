"""The way of a command to the deployment's cache, checked before anything is done."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from prometheus_client import CollectorRegistry

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.embedded import socket_in_use
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.key import Digester, make_digester
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.store_factory import open_client
from services.cache_proxy.config.settings import DEFAULT_EMBEDDED_DIR, CacheSettings, KeySettings, read_secret
from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import Servers
from services.cache_proxy.redis_client.client_factory import servers
from services.common.errors import CommandError, UsageError

_TIMEOUT_SECONDS = 5.0  # nobody waits behind a command, so a busy Redis may take its time


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of a deployment, for one model version."""

    servers: Servers
    key: KeySettings
    store: RedisStore
    log: InvalidationLog
    digest: Digester


@asynccontextmanager
async def open_cache(
    cache: CacheSettings, key: KeySettings, *, may_be_new: bool = False
) -> AsyncIterator[Cache]:
    """Raises UsageError where the settings are not the deployment's, CommandError where Redis fails."""
    if cache.cache_url.startswith("memory:"):
        raise UsageError("--cache-url memory: is a cache that only its own process can see")
    cache = replace(cache, cache_timeout_seconds=max(cache.cache_timeout_seconds, _TIMEOUT_SECONDS))
    async with open_client(_running_one(cache)) as client:
        reached = servers(client)
        try:
            await namespace.check(reached, key, may_be_new=may_be_new)
            yield _of(reached, key)
        except StoreError as error:
            message = f"the cache cannot do this: {error}"
            raise CommandError(message) from error
        finally:
            await reached.close()


def version_of(cache: Cache, model_version: str) -> Cache:
    """The same deployment's cache of another model version."""
    return _of(cache.servers, replace(cache.key, model_version=model_version))


def _of(reached: Servers, key: KeySettings) -> Cache:
    base = namespace.base_key(key)
    secret = read_secret(key.key_secret_file, flag_name="--key-secret-file")
    return Cache(
        servers=reached,
        key=key,
        store=RedisStore(reached, base=base, metrics=ProxyMetrics(CollectorRegistry())),
        log=InvalidationLog(reached, namespace.log_key(key)),
        digest=make_digester(normalize=key.normalize, secret=secret),
    )


def _running_one(cache: CacheSettings) -> CacheSettings:
    """For `embedded:`, the server that a running proxy has started; else one is started for the command."""
    scheme, _, folder = cache.cache_url.partition(":")
    if scheme != "embedded":
        return cache
    socket = socket_in_use(Path(folder or DEFAULT_EMBEDDED_DIR))
    return cache if socket is None else replace(cache, cache_url=f"unix://{quote(socket)}")
