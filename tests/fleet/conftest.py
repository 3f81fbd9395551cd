"""A fleet of real processes for each test, over each kind of server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet import Fleet, fleet


@pytest.fixture
def running(tmp_path: Path, redis_program: str) -> Iterator[Fleet]:
    """Redis and the stub; no replica yet."""
    with fleet(tmp_path, "--latency", "200ms", program=redis_program) as started:
        yield started
