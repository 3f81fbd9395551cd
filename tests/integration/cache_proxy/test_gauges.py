"""The gauges of the fleet while Redis is there and while it is lost."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.cache_proxy.conftest import StartProxyEnvironment
from tests.support.caller import read_metrics
from tests.support.redis_server import RedisServer, redis_process, wait_for


@pytest.fixture
def private_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis server that the test may kill."""
    with redis_process(tmp_path) as server:
        yield server


@pytest.mark.slow
def test_idle_replicas_report_lost_redis(
    stage_with: StartProxyEnvironment, private_redis: RedisServer
) -> None:
    """Without any request they report to be degraded and alone, until Redis is back."""
    flags = ("--cache-url", private_redis.url, "--model-calls-per-second", "1")
    first = stage_with(*flags)
    second = stage_with(*flags)

    def all_report(live: int, degraded: int) -> bool:
        metrics = [read_metrics(stage.proxy.http_url) for stage in (first, second)]
        return all(
            one["cache_proxy_live_replicas",] == live and one["cache_proxy_degraded",] == degraded
            for one in metrics
        )

    wait_for(lambda: all_report(2, 0), description="two replicas")
    private_redis.kill()
    wait_for(lambda: all_report(1, 1), description="each is alone")
    private_redis.start()
    wait_for(lambda: all_report(2, 0), description="both are back")
