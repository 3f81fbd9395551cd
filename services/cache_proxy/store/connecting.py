"""Clients for every kind of server that `--cache-url` names: alone, behind Sentinels, a Cluster."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import redis.asyncio
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.connection import SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.cache_proxy.access.renewals import Renewals
from services.cache_proxy.config import CacheSettings, redact
from services.cache_proxy.store.cluster import ClusterServers
from services.cache_proxy.store.renewing import follow, following
from services.cache_proxy.store.servers import OneServer, Servers
from services.common.errors import UsageError

_MAX_CONNECTIONS = 32  # the queue's scripts and its subscription are on the same client
_OWN = {"ssl_certfile", "ssl_keyfile"}
_PORTS = {"redis+cluster": 6379, "redis+sentinel": 26379}

Client = redis.asyncio.Redis | RedisCluster


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """How one is let in; `tls_ca` also says that the way there is encrypted."""

    username: str | None = None
    password: bytes | None = None
    tls_ca: str | None = None


def connect(
    url: str, *, timeout_seconds: float, access: Access | None = None, renewals: Renewals | None = None
) -> Client:
    """A client that bounds every wait. Raises UsageError for a URL that none can be made of.

    `renewals` looks after the files of its TLS.
    """
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
            return _cluster(url, options, access, renewals)
        if url.startswith("redis+sentinel:"):
            return _behind_sentinels(url, options, access, renewals)
        return _alone(url, options, access, renewals)
    except (ValueError, TypeError, AttributeError, OSError, RedisError) as error:
        # Never the error's own words: they may quote the part of the URL that holds the password.
        message = f"--cache-url {redact(url)}: not a URL that can be used ({type(error).__name__})"
        raise UsageError(message) from error


def servers(client: Client) -> Servers:
    """What the store needs of a client."""
    return ClusterServers(client) if isinstance(client, RedisCluster) else OneServer(client)


def user_of(cache: CacheSettings) -> str:
    """Return the ACL user that the settings name: the flag's, else the URL's, else Redis's default one."""
    if cache.cache_username is not None:
        return cache.cache_username
    login, at, _ = urlsplit(cache.cache_url).netloc.rpartition("@")
    return unquote(login.partition(":")[0]) or "default" if at else "default"


def _alone(
    url: str, options: dict[str, Any], access: Access, renewals: Renewals | None
) -> "redis.asyncio.Redis":
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
    if pool.connection_class is SSLConnection:
        pool.connection_class = following(SSLConnection, follow(pool.connection_kwargs, renewals))
    return redis.asyncio.Redis(connection_pool=pool)


def _behind_sentinels(
    url: str, options: dict[str, Any], access: Access, renewals: Renewals | None
) -> "redis.asyncio.Redis":
    hosts, path, own = _parts(url, options)
    tls = _tls(access, own)
    service, _, database = path.partition("/")
    if not service:
        raise ValueError("no service")
    timeouts = {name: value for name, value in options.items() if name.startswith("socket_")}
    sentinel = Sentinel(hosts, sentinel_kwargs=timeouts | tls)  # type: ignore[no-untyped-call]
    client: redis.asyncio.Redis = sentinel.master_for(
        service, db=int(database or 0), retry=_once_more(), **options, **tls
    )
    if tls:
        context = follow(tls, renewals)
        for pool in (client.connection_pool, *(one.connection_pool for one in sentinel.sentinels)):
            pool.connection_class = following(pool.connection_class, context)
    return client


def _cluster(url: str, options: dict[str, Any], access: Access, renewals: Renewals | None) -> RedisCluster:
    hosts, path, own = _parts(url, options)
    tls = _tls(access, own)
    if path:
        raise ValueError("a Cluster has one database")
    client = RedisCluster(
        startup_nodes=[ClusterNode(host, port) for host, port in hosts],
        require_full_coverage=False,
        max_connections=_MAX_CONNECTIONS,
        retry=Retry(NoBackoff(), 0),
        **options,
        **tls,
    )
    if tls:
        kind = following(SSLConnection, follow(tls, renewals))
        client.connection_kwargs["connection_class"] = kind  # of nodes that it is yet to hear of
        for node in client.nodes_manager.startup_nodes.values():
            node.connection_class = kind
    return client


def _once_more() -> Retry:
    """Once more: the server may have closed a connection that lay idle, and a process that got no time of the
    machine finds its own timer over before it reads the answer. Whatever is sent may be sent twice.
    """  # noqa: D205 - one thought
    return Retry(NoBackoff(), 1)


def _tls(access: Access, own: dict[str, str]) -> dict[str, Any]:
    if access.tls_ca is None:
        if own:
            raise ValueError("a certificate without TLS")
        return {}
    return {"ssl": True, "ssl_ca_certs": access.tls_ca, **own}


def _parts(url: str, options: dict[str, Any]) -> tuple[list[tuple[str, int]], str, dict[str, str]]:
    """The hosts with their ports, the path, and the files of one's own certificate; a user or a password in
    the URL goes into the options.
    """  # noqa: D205 - one thought
    parts = urlsplit(url)
    own = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else ())
    if not own.keys() <= _OWN or parts.fragment:
        raise ValueError("parameters")
    user, _, hosts = parts.netloc.rpartition("@")
    name, _, password = user.partition(":")
    if name:
        options.setdefault("username", unquote(name))
    if password:
        options.setdefault("password", unquote(password))
    found = [_host(item, _PORTS[parts.scheme]) for item in hosts.split(",")]
    return found, parts.path.strip("/"), own


def _host(item: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{item}")
    if not parts.hostname:
        raise ValueError("no host")
    return parts.hostname, parts.port or port
