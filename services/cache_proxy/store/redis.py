"""The store on a Redis or Valkey server: hash buckets, one script call for a batch."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.config import redact
from services.cache_proxy.errors import StoreError, StoreRefused
from services.cache_proxy.metrics import ProxyMetrics
from services.cache_proxy.riders import Riders
from services.common.errors import UsageError

_DAY_0_UNIX_SECONDS = 1_704_067_200  # 2024-01-01: the day fits 13 bits until 2046
_SCRIPT_PAIRS = 1000  # a script call of this size holds Redis for about 2 ms
_MAX_OPERATIONS = 16
_MAX_CONNECTIONS = 32  # the queue's scripts and its subscription are on the same client
_SCRIPTS = Path(__file__).parent


class RedisStore:
    """Looks up and remembers whole batches; both scripts may be repeated, so one retry is safe.

    State: `_failures`, so that whoever waited behind a server that fell silent does not wait for it too.
    """

    def __init__(self, client: "redis.asyncio.Redis", *, namespace: str, metrics: ProxyMetrics) -> None:
        self._client = client
        self._metrics = metrics
        self._keys = [namespace]
        # Waiting for one's turn is not the server being slow: only the operation itself is timed out.
        self._turns = asyncio.Semaphore(_MAX_OPERATIONS)
        self._failures = 0
        self._together = Riders(self._get_together, size=len, most=_SCRIPT_PAIRS)
        self._get = client.register_script((_SCRIPTS / "get.lua").read_bytes())
        self._put = client.register_script((_SCRIPTS / "put.lua").read_bytes())

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Store.get`."""
        levels = bytearray()
        for chunk in _chunks(digests):
            levels += await self._together.ride(chunk)
        return levels

    async def _get_together(self, chunks: Sequence[Sequence[bytes]]) -> Sequence[bytes]:
        async with self._operation("get"):
            packed = b"".join(itertools.chain.from_iterable(chunks))
            found, garbage = await self._get(keys=self._keys, args=[packed])
            self._metrics.store_garbage.inc(garbage)
        if len(found) != sum(map(len, chunks)):
            message = f"the store answered {len(found)} of {sum(map(len, chunks))} look-ups"
            raise StoreError(message)
        levels = iter(found)
        return [bytes(itertools.islice(levels, len(chunk))) for chunk in chunks]

    async def put(self, levels: Mapping[bytes, int]) -> None:
        """See `Store.put`."""
        for chunk in _chunks(list(levels.items())):
            packed = b"".join(digest + bytes((level,)) for digest, level in chunk)
            async with self._operation("put"):
                await self._put(keys=self._keys, args=[packed, _DAY_0_UNIX_SECONDS])

    async def close(self) -> None:
        """See `Store.close`."""
        await self._client.aclose(close_connection_pool=True)  # which it does not do by itself

    @asynccontextmanager
    async def _operation(self, name: str) -> AsyncIterator[None]:
        failures = self._failures
        async with self._turns:
            if self._failures != failures:
                raise StoreError("it failed whoever asked before")
            try:
                with self._metrics.store_duration.labels(name).time(), _translated():
                    yield
            except StoreRefused:
                raise  # it answered
            except StoreError:
                self._failures += 1
                raise


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        raise StoreError(str(error) or type(error).__name__) from error
    except ResponseError as error:
        raise StoreRefused(str(error)) from error
    except RedisError as error:
        raise StoreError(str(error) or type(error).__name__) from error


def connect(
    url: str,
    *,
    timeout_seconds: float,
    username: str | None = None,
    password: bytes | None = None,
    tls_ca: str | None = None,
) -> "redis.asyncio.Redis":
    """A client that waits for a free connection instead of raising, and bounds every wait."""
    options: dict[str, Any] = {
        "max_connections": _MAX_CONNECTIONS,
        "timeout": timeout_seconds,
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "health_check_interval": 0,
        # Once more: the server may have closed a connection that lay idle, and a process that got no time of
        # the machine finds its own timer over before it reads the answer. Whatever is sent may be sent twice.
        "retry": Retry(NoBackoff(), 1),
    }
    if username is not None:
        options["username"] = username
    if password is not None:
        options["password"] = password
    if tls_ca is not None:
        options["ssl_ca_certs"] = tls_ca
    try:
        pool = redis.asyncio.BlockingConnectionPool.from_url(url, **options)
        pool.make_connection()  # type: ignore[no-untyped-call]  # not yet opened; it shows a parameter that no connection knows
    except (ValueError, TypeError, AttributeError, OSError) as error:
        # Never the error's own words: they may quote the part of the URL that holds the password.
        message = f"--cache-url {redact(url)}: not a URL that can be used ({type(error).__name__})"
        raise UsageError(message) from error
    return redis.asyncio.Redis(connection_pool=pool)


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in itertools.count(step=_SCRIPT_PAIRS):
        if start >= len(items):
            return
        yield items[start : start + _SCRIPT_PAIRS]
