"""What tests of the store on a real server share."""

import itertools
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import Servers
from services.cache_proxy.redis_client.client_factory import connect, servers
from tests.support.queue_subjects import Open, opening

_bases = (f"conftest{number}:c2:" for number in itertools.count())


@pytest.fixture(params=["local", "redis"])
def opened(request: pytest.FixtureRequest, shared_redis: str) -> Open:
    """Opens a queue of each kind with the limits and quotas that a test needs."""
    return opening(request.param, shared_redis)


@pytest.fixture
def base() -> str:
    """The base of a namespace of the test's own."""
    return next(_bases)


@pytest.fixture
async def reached(shared_redis: str) -> AsyncIterator[Servers]:
    """The shared server, as the store sees it."""
    opened = servers(connect(shared_redis, timeout_seconds=5))
    yield opened
    await opened.close()


@pytest.fixture
def redis_store(reached: Servers, base: str) -> RedisStore:
    """A store on the shared server."""
    return RedisStore(reached, base=base, metrics=ProxyMetrics(CollectorRegistry()))
