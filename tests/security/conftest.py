"""A proxy under attack, and an honest_caller caller that must still be served."""

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
    """A proxy under attack, and an honest_caller caller that connected before the attack."""

    proxy: ServiceProcess
    honest_caller: Caller

    def is_serving(self) -> bool:
        """Return whether the honest_caller caller gets a response."""
        return self.honest_caller.infer([("honest_caller", "t")], timeout_seconds=30).code is StatusCode.OK

    def rss_mib(self) -> int:
        """Return the memory of the proxy's process."""
        status = Path(f"/proc/{self.proxy.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024


@contextmanager
def attack_proxy(*args: str) -> Iterator[AttackedProxy]:
    """Start a proxy for one test."""
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target", model.target, "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS, *args
        ) as proxy,
        open_caller(proxy.target) as honest_caller,
    ):
        attacked = AttackedProxy(proxy, honest_caller)
        assert attacked.is_serving()
        yield attacked


@pytest.fixture(scope="package")
def _shared_attacked_proxy() -> Iterator[AttackedProxy]:
    with attack_proxy("--max-request-bytes", str(MAX_REQUEST_BYTES)) as attacked:
        yield attacked


@pytest.fixture
def attacked_proxy(_shared_attacked_proxy: AttackedProxy) -> Iterator[AttackedProxy]:
    """Share one proxy among all attacks. After each it must serve the earlier caller and a new one."""
    yield _shared_attacked_proxy
    assert _shared_attacked_proxy.is_serving()
    with open_caller(_shared_attacked_proxy.proxy.target) as new_caller:
        assert new_caller.infer([("honest_caller", "t")], timeout_seconds=30).code is StatusCode.OK
    assert "Traceback" not in _shared_attacked_proxy.proxy.log
