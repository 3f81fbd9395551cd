"""A proxy that is attacked, and a caller that must not notice."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import Caller, open_caller
from tests.support.model_server import scripted_model
from tests.support.processes import ServiceProcess, cache_proxy

MAX_REQUEST_BYTES = 2**20


@dataclass(frozen=True)
class AttackedProxy:
    """The proxy, and an honest caller whose connection is older than the attack."""

    proxy: ServiceProcess
    honest_caller: Caller

    def is_serving(self) -> bool:
        """Whether an honest caller gets its answer."""
        return self.honest_caller.infer([("honest", "t")], timeout_seconds=30).code is StatusCode.OK

    def rss_mib(self) -> int:
        """Memory of the proxy."""
        status = Path(f"/proc/{self.proxy.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024


@contextmanager
def attacked_proxy(*args: str) -> Iterator[AttackedProxy]:
    """A proxy of a test's own."""
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target", model.target, "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS, *args
        ) as proxy,
        open_caller(proxy.target) as honest,
    ):
        made = AttackedProxy(proxy, honest)
        assert made.is_serving()
        yield made


@pytest.fixture(scope="package")
def _shared_siege() -> Iterator[AttackedProxy]:
    with attacked_proxy("--max-request-bytes", str(MAX_REQUEST_BYTES)) as made:
        yield made


@pytest.fixture
def siege(_shared_siege: AttackedProxy) -> Iterator[AttackedProxy]:
    """One proxy for all attacks; after each it lives, and serves the caller of before and a new one."""
    yield _shared_siege
    assert _shared_siege.is_serving()
    with open_caller(_shared_siege.proxy.target) as new:
        assert new.infer([("honest", "t")], timeout_seconds=30).code is StatusCode.OK
    assert "Traceback" not in _shared_siege.proxy.log
