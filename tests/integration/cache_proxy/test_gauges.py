"""The gauges of the fleet: what they tell while it is whole, and while Redis is gone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cache_proxy.conftest import StartProxyEnvironment
from tests.support.caller import read_metrics
from tests.support.redis_server import RedisServer, redis_process, wait_for


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to kill."""
    with redis_process(tmp_path) as server:
        yield server


@pytest.mark.slow
def test_an_idle_replica_tells_that_redis_is_gone(
    stage_with: StartProxyEnvironment, own_redis: RedisServer
) -> None:
    """Nobody asks anything, yet it is degraded, alone, and its queue empty, until Redis is back."""
    flags = ("--cache-url", own_redis.url, "--model-calls-per-second", "1")
    first, second = stage_with(*flags), stage_with(*flags)

    def tells(live: int, degraded: int) -> bool:
        found = [read_metrics(stage.proxy.http_url) for stage in (first, second)]
        return all(
            one["cache_proxy_live_replicas",] == live and one["cache_proxy_degraded",] == degraded
            for one in found
        )

    wait_for(lambda: tells(2, 0), description="both are known")
    own_redis.kill()
    wait_for(lambda: tells(1, 1), description="each is alone")
    own_redis.start()
    wait_for(lambda: tells(2, 0), description="both are back")
