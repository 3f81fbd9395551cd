"""A fleet of processes for each test, with each kind of Redis server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tests.support.fleet


@pytest.fixture
def fleet(tmp_path: Path, redis_program: str) -> Iterator[tests.support.fleet.Fleet]:
    """Run Redis and a model stub of 200 ms latency. No replica is started."""
    with tests.support.fleet.fleet(tmp_path, "--latency", "200ms", program=redis_program) as started:
        yield started
