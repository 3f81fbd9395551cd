"""Fixtures and settings for all tests: Redis servers and hypothesis."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.redis_server import PROGRAMS, redis_url

pytest_plugins = ("tests.support.cache_fixtures",)

# No deadline: on two busy cores a fast example is slow now and then.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

# A shell makes its background jobs ignore Ctrl-C, and each process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of a Redis for the whole session. Each test uses a key prefix that no other test has."""
    with redis_url(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session", params=PROGRAMS)
def redis_program(request: pytest.FixtureRequest) -> str:
    """Return the program of each kind of server: Redis, and the Valkey of the embedded store."""
    program = PROGRAMS[request.param]
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    return program
