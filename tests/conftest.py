"""What every test may use: where Redis comes from, and how hypothesis looks for counterexamples."""

import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.redis_server import PROGRAMS, redis_url

pytest_plugins = ("tests.support.cache_fixtures",)

settings.register_profile(
    "tests",
    deadline=None,  # two busy cores make a fast example slow now and then
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tests")

# A shell ignores Ctrl-C for what it starts in the background, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Redis for the whole session; a test keeps to a `--key-prefix` of its own."""
    with redis_url(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="session", params=PROGRAMS)
def redis_program(request: pytest.FixtureRequest) -> str:
    """Each kind of server that the fleet must work with: Redis, and the Valkey of the embedded store."""
    program = PROGRAMS[request.param]
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    return program
