"""A proxy that is attacked, and a caller that must not notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import UNPACED
from tests.support.caller import Caller, caller
from tests.support.model_server import scripted_model
from tests.support.processes import Service, cache_proxy

MAX_REQUEST_BYTES = 2**20


@dataclass(frozen=True)
class Siege:
    """The proxy, and an honest caller whose connection is older than the attack."""

    proxy: Service
    honest: Caller

    def is_served(self) -> bool:
        """Whether an honest caller gets its answer."""
        return self.honest.ask([("honest", "t")], seconds=30).code is StatusCode.OK

    def rss_mib(self) -> int:
        """Memory of the proxy."""
        status = Path(f"/proc/{self.proxy.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024


@contextmanager
def siege_of(*args: str) -> Iterator[Siege]:
    """A proxy of a test's own."""
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, "--cache-url", "memory:", *UNPACED, *args) as proxy,
        caller(proxy.target) as honest,
    ):
        made = Siege(proxy, honest)
        assert made.is_served()
        yield made


@pytest.fixture(scope="package")
def _shared_siege() -> Iterator[Siege]:
    with siege_of("--max-request-bytes", str(MAX_REQUEST_BYTES)) as made:
        yield made


@pytest.fixture
def siege(_shared_siege: Siege) -> Iterator[Siege]:
    """One proxy for all attacks; after each it lives, and serves the caller of before and a new one."""
    yield _shared_siege
    assert _shared_siege.is_served()
    with caller(_shared_siege.proxy.target) as new:
        assert new.ask([("honest", "t")], seconds=30).code is StatusCode.OK
    assert "Traceback" not in _shared_siege.proxy.log
