"""Create the Redis client for a cache URL: a single server, one behind Sentinels, or a Cluster."""

from dataclasses import dataclass
from typing import Any

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.config import cache_url
from services.cache_proxy.config.cache_settings import CacheSettings
from services.cache_proxy.config.cache_url import CacheUrl
from services.cache_proxy.redis_client.backend import RedisBackend, SingleServerBackend
from services.cache_proxy.redis_client.cluster import ClusterBackend
from services.cache_proxy.redis_client.sentinels import ParallelSentinel
from services.cache_proxy.redis_client.tls import (
    ReloadingTlsContext,
    UnixSocketConnection,
    load_credentials,
    load_tls_context,
    reloading_connection_class,
)
from services.common.errors import UsageError

# The queue's scripts and its subscription use the same client as the store.
_MAX_CONNECTIONS = 32

RedisClient = redis.asyncio.Redis | RedisCluster


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisCredentials:
    """Logins for Redis and its Sentinels, and the CA of their certificates.

    `tls_ca` also means that connections are encrypted. A password file takes precedence over a password.
    """

    username: str | None = None
    password: bytes | None = None
    password_file: str | None = None
    tls_ca: str | None = None
    sentinel_username: str | None = None
    sentinel_password_file: str | None = None


def create_client(
    url: str,
    *,
    timeout_seconds: float,
    credentials: RedisCredentials | None = None,
    reloader: FileReloader | None = None,
) -> RedisClient:
    """Return a client for a URL that limits every wait to `timeout_seconds`. Raises UsageError.

    `reloader` watches the files of its certificates and passwords.
    """
    parts = cache_url.parse(url)
    credentials = credentials or RedisCredentials()
    options: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "health_check_interval": 0,
        # Else each connection sends the name of the library, which needs one more permission.
        "driver_info": None,
        "credential_provider": load_credentials(
            username=credentials.username or parts.username,
            password=credentials.password or parts.password,
            path=credentials.password_file,
            flag_name="--cache-password-file",
            metric_label="cache_password",
            reloader=reloader,
        ),
    }
    tls_files = _tls_file_options(parts, credentials)
    tls = None if tls_files is None else load_tls_context(tls_files, reloader)
    options |= tls_files or {}
    if parts.scheme == "redis+cluster":
        return _cluster_client(parts, options, tls)
    if parts.scheme == "redis+sentinel":
        return _sentinel_client(parts, options, tls, credentials, reloader)
    return _single_server_client(parts, options, tls)


def backend_for(client: RedisClient) -> RedisBackend:
    """Return the backend that runs scripts and commands by a client."""
    return ClusterBackend(client) if isinstance(client, RedisCluster) else SingleServerBackend(client)


def acl_user(cache: CacheSettings) -> str:
    """Return the ACL user that the settings name: the flag's, else the URL's, else Redis's default one."""
    return cache.cache_username or cache_url.parse(cache.cache_url).username or "default"


def _single_server_client(
    parts: CacheUrl, options: dict[str, Any], tls: ReloadingTlsContext | None
) -> "redis.asyncio.Redis":
    connection_class: type[Any] = UnixSocketConnection
    if parts.scheme == "unix":
        options["path"] = parts.path
    else:
        [(options["host"], options["port"])] = parts.hosts
        connection_class = reloading_connection_class(Connection if tls is None else SSLConnection, tls)
    # This pool waits for a free connection instead of raising.
    pool = redis.asyncio.BlockingConnectionPool(
        connection_class=connection_class,
        max_connections=_MAX_CONNECTIONS,
        timeout=options["socket_timeout"],
        db=parts.database,
        retry=_retry_once(),
        **options,
    )
    return redis.asyncio.Redis(connection_pool=pool)


def _sentinel_client(
    parts: CacheUrl,
    options: dict[str, Any],
    tls: ReloadingTlsContext | None,
    credentials: RedisCredentials,
    reloader: FileReloader | None,
) -> "redis.asyncio.Redis":
    if tls is not None:
        options["ssl"] = True
    sentinel_credentials = load_credentials(
        username=credentials.sentinel_username,
        password=None,
        path=credentials.sentinel_password_file,
        flag_name="--sentinel-password-file",
        metric_label="sentinel_password",
        reloader=reloader,
    )
    sentinel = ParallelSentinel(
        parts.hosts,
        service=parts.service,
        user=credentials.sentinel_username or "default",
        failure_ttl_seconds=options["socket_timeout"],
        options={
            **options,
            "credential_provider": sentinel_credentials,
            "retry": Retry(NoBackoff(), 0),
        },
    )
    client: redis.asyncio.Redis = sentinel.master_for(
        parts.service, db=parts.database, retry=_retry_once(), **options
    )
    for pool in (client.connection_pool, *(each.connection_pool for each in sentinel.sentinels)):
        pool.connection_class = reloading_connection_class(pool.connection_class, tls)
    return client


def _cluster_client(
    parts: CacheUrl, options: dict[str, Any], tls: ReloadingTlsContext | None
) -> RedisCluster:
    if tls is not None:
        options["ssl"] = True
    client = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in parts.hosts],
        require_full_coverage=False,
        max_connections=_MAX_CONNECTIONS,
        retry=Retry(NoBackoff(), 0),
        **options,
    )
    connection_class = reloading_connection_class(Connection if tls is None else SSLConnection, tls)
    # For the nodes that the client discovers later, then for those that it has already.
    client.connection_kwargs["connection_class"] = connection_class
    for node in client.nodes_manager.startup_nodes.values():
        node.connection_class = connection_class
    return client


def _retry_once() -> Retry:
    """Return a policy of one retry without a pause; every command may therefore be sent twice.

    The server may have closed an idle connection. Also, a process that was not scheduled for long finds its
    own timer expired before it reads the reply.
    """
    return Retry(NoBackoff(), 1)


def _tls_file_options(parts: CacheUrl, credentials: RedisCredentials) -> dict[str, Any] | None:
    """Return the TLS files under redis-py's option names, or None for connections without TLS."""
    if credentials.tls_ca is None and parts.scheme != "rediss":
        if parts.client_certificate:
            raise UsageError("--cache-url: its certificate is for TLS, so --cache-tls-ca must be given too")
        return None
    ca = {} if credentials.tls_ca is None else {"ssl_ca_certs": credentials.tls_ca}
    return {**ca, **parts.client_certificate}
