"""Fixtures for tests of the queue and of the store on a real server."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from prometheus_client import CollectorRegistry

from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import RedisBackend
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from tests.support.answer_stores import OnRedis, make_metrics
from tests.support.queue_subjects import QueueFactory, queue_factory
from tests.support.redis_server import RedisServer, redis_process

_bases = (f"conftest{number}:c2:" for number in itertools.count())


@pytest.fixture(params=["local", "redis"])
def opened(request: pytest.FixtureRequest, shared_redis: str) -> QueueFactory:
    """Return a function that opens a queue of each kind with given limits and quotas."""
    return queue_factory(request.param, shared_redis)


@pytest.fixture
def base() -> str:
    """Return the base key of a namespace for this test only."""
    return next(_bases)


@pytest.fixture
async def backend(shared_redis: str) -> AsyncIterator[RedisBackend]:
    """Yield the backend for the shared server."""
    opened = backend_for(create_client(shared_redis, timeout_seconds=5))
    yield opened
    await opened.close()


@pytest.fixture
def redis_store(backend: RedisBackend, base: str) -> RedisStore:
    """Return a store on the shared server."""
    return RedisStore(backend, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))


@pytest.fixture
async def on_redis(shared_redis: str) -> AsyncIterator[OnRedis]:
    """Yield a store on the shared server, its metrics, another client of the server, and its base key."""
    metrics = make_metrics()
    base_key = next(_bases)
    opened = RedisStore(
        backend_for(create_client(shared_redis, timeout_seconds=2)), base_key=base_key, metrics=metrics
    )
    with redis.Redis.from_url(shared_redis) as client:
        yield opened, metrics, client, base_key
    await opened.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Yield a server for this test only, to stop and to fill."""
    with redis_process(tmp_path) as server:
        yield server
