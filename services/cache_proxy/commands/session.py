"""The connection of a command to the cache of a deployment, verified before it is used."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from prometheus_client import CollectorRegistry

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.embedded import running_server_socket
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.key import Digester, make_digester
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.store_factory import open_client
from services.cache_proxy.config.cache_settings import DEFAULT_EMBEDDED_DIR, CacheSettings, KeySettings
from services.cache_proxy.config.secret_file import read_secret
from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import RedisBackend
from services.cache_proxy.redis_client.client_factory import backend_for
from services.common.errors import CommandError, UsageError

# No request waits for a command, so Redis may take longer than for the proxy.
_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class CacheSession:
    """The cache of one model version of a deployment."""

    backend: RedisBackend
    key_settings: KeySettings
    store: RedisStore
    invalidation_log: InvalidationLog
    digest: Digester


@asynccontextmanager
async def open_session(
    cache_settings: CacheSettings, key_settings: KeySettings, *, allow_new: bool = False
) -> AsyncIterator[CacheSession]:
    """Connect to the cache of a deployment.

    With `allow_new`, the cache may be new and empty. Raises `UsageError` if the settings differ from the
    deployment's, `CommandError` if Redis fails.
    """
    if cache_settings.cache_url.startswith("memory:"):
        raise UsageError("--cache-url memory: is a cache that only its own process can see")
    cache_settings = replace(
        cache_settings, cache_timeout_seconds=max(cache_settings.cache_timeout_seconds, _TIMEOUT_SECONDS)
    )
    async with open_client(_prefer_running_server(cache_settings)) as client:
        backend = backend_for(client)
        try:
            await namespace.verify(backend, key_settings, allow_new=allow_new)
            yield _make_session(backend, key_settings)
        except StoreError as error:
            message = f"the cache cannot do this: {error}"
            raise CommandError(message) from error
        finally:
            await backend.close()


def for_model_version(session: CacheSession, model_version: str) -> CacheSession:
    """Return a session for another model version of the same deployment."""
    return _make_session(session.backend, replace(session.key_settings, model_version=model_version))


def _make_session(backend: RedisBackend, key_settings: KeySettings) -> CacheSession:
    base = namespace.cache_keys(key_settings).base
    secret = read_secret(key_settings.key_secret_file, flag_name="--key-secret-file")
    return CacheSession(
        backend=backend,
        key_settings=key_settings,
        store=RedisStore(backend, base_key=base, metrics=ProxyMetrics(CollectorRegistry())),
        invalidation_log=InvalidationLog(backend, namespace.queue_keys(key_settings).invalidation_log),
        digest=make_digester(normalize=key_settings.normalize, secret=secret),
    )


def _prefer_running_server(cache: CacheSettings) -> CacheSettings:
    """Return the settings, for `embedded:` with the URL of the server that a running proxy has started.

    If no proxy is running, the command starts the server itself.
    """
    scheme, _, folder = cache.cache_url.partition(":")
    if scheme != "embedded":
        return cache
    socket = running_server_socket(Path(folder or DEFAULT_EMBEDDED_DIR))
    return cache if socket is None else replace(cache, cache_url=f"unix://{quote(socket)}")
