"""Clients for every kind of server that `--cache-url` names: alone, behind Sentinels, a Cluster."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.cache_proxy.config import redact
from services.cache_proxy.store.cluster import ClusterServers
from services.cache_proxy.store.servers import OneServer, Servers
from services.common.errors import UsageError

_MAX_CONNECTIONS = 32  # the queue's scripts and its subscription are on the same client
_PORTS = {"redis+cluster": 6379, "redis+sentinel": 26379}

Client = redis.asyncio.Redis | RedisCluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How one is let in; `tls_ca` also says that the way there is encrypted."""

    username: str | None = None
    password: bytes | None = None
    tls_ca: str | None = None


def connect(url: str, *, timeout_seconds: float, access: Access | None = None) -> Client:
    """A client that bounds every wait. Raises UsageError for a URL that none can be made of."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "health_check_interval": 0,
        "driver_info": None,  # else each connection tells its library's name, which needs a right more
    }
    access = access or Access()
    if access.username is not None:
        options["username"] = access.username
    if access.password is not None:
        options["password"] = access.password
    try:
        if url.startswith("redis+cluster:"):
            return _cluster(url, options, access)
        if url.startswith("redis+sentinel:"):
            return _behind_sentinels(url, options, access)
        return _alone(url, options, access)
    except (ValueError, TypeError, AttributeError, OSError, RedisError) as error:
        # Never the error's own words: they may quote the part of the URL that holds the password.
        message = f"--cache-url {redact(url)}: not a URL that can be used ({type(error).__name__})"
        raise UsageError(message) from error


def servers(client: Client) -> Servers:
    """What the store needs of a client."""
    return ClusterServers(client) if isinstance(client, RedisCluster) else OneServer(client)


def _alone(url: str, options: dict[str, Any], access: Access) -> "redis.asyncio.Redis":
    if access.tls_ca is not None:
        options["ssl_ca_certs"] = access.tls_ca
    # A pool that waits for a free connection instead of raising.
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url,
        max_connections=_MAX_CONNECTIONS,
        timeout=options["socket_timeout"],
        retry=_once_more(),
        **options,
    )
    # Not yet opened; it shows a parameter that no connection knows.
    pool.make_connection()  # type: ignore[no-untyped-call]
    return redis.asyncio.Redis(connection_pool=pool)


def _behind_sentinels(url: str, options: dict[str, Any], access: Access) -> "redis.asyncio.Redis":
    hosts, path = _parts(url, options)
    service, _, database = path.partition("/")
    if not service:
        raise ValueError("no service")
    timeouts = {name: value for name, value in options.items() if name.startswith("socket_")}
    sentinel = Sentinel(hosts, sentinel_kwargs=timeouts | _tls(access, "ssl"))  # type: ignore[no-untyped-call]
    client: redis.asyncio.Redis = sentinel.master_for(
        service, db=int(database or 0), retry=_once_more(), **options, **_tls(access, "ssl")
    )
    return client


def _cluster(url: str, options: dict[str, Any], access: Access) -> RedisCluster:
    hosts, path = _parts(url, options)
    if path:
        raise ValueError("a Cluster has one database")
    return RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in hosts],
        require_full_coverage=False,
        max_connections=_MAX_CONNECTIONS,
        retry=Retry(NoBackoff(), 0),
        **options,
        **_tls(access, "ssl"),
    )


def _once_more() -> Retry:
    """Once more: the server may have closed a connection that lay idle, and a process that got no time of the
    machine finds its own timer over before it reads the answer. Whatever is sent may be sent twice.
    """  # noqa: D205 - one thought
    return Retry(NoBackoff(), 1)


def _tls(access: Access, name: str) -> dict[str, Any]:
    return {} if access.tls_ca is None else {name: True, "ssl_ca_certs": access.tls_ca}


def _parts(url: str, options: dict[str, Any]) -> tuple[list[tuple[str, int]], str]:
    """The hosts with their ports, and the path; a user or a password in the URL goes into the options."""
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise ValueError("parameters")
    user, _, hosts = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    if name:
        options.setdefault("username", unquote(name))
    if password:
        options.setdefault("password", unquote(password))
    found = [_host(item, _PORTS[parts.scheme]) for item in hosts.split(",")]
    return found, parts.path.strip("/")


def _host(item: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{item}")
    if not parts.hostname:
        raise ValueError("no host")
    return parts.hostname, parts.port or port
