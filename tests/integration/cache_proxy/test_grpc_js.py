"""A caller with another implementation of gRPC, @grpc/grpc-js on Node."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, StartProxyEnvironment
from tests.support.processes import ROOT

_WORKERS = 32
_CLIENT = ROOT / "tests" / "support" / "grpc_js"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the client and its dependencies installed."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("no npm is installed")
    folder = tmp_path_factory.mktemp("node") / "client"
    shutil.copytree(_CLIENT, folder)
    subprocess.run(
        [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.mark.slow
def test_grpc_js_gets_health_reflection_and_only_unavailable_during_a_drain(
    node: Path, stage_with: StartProxyEnvironment
) -> None:
    """Health and both versions of reflection work. 32 workers get levels or UNAVAILABLE in a drain."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    command = ["node", "client.js", stage.proxy.target, str(ROOT / "protos" / "seniority.proto")]
    with subprocess.Popen(command, cwd=node, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout
        assert client.stdout.readline() == "going\n"
        stage.proxy.process.send_signal(signal.SIGTERM)
        found = json.loads(client.stdout.readline())
    assert stage.proxy.process.wait(30) == 0
    listed = health_pb2.HealthListResponse.FromString(bytes.fromhex(found["list"]))  # type: ignore[attr-defined]
    assert set(listed.statuses) == {"", "SeniorityModel"}
    assert found["check"] == "0801"
    for version in ("v1", "v1alpha"):
        assert "SeniorityModel" in found["reflected"][version]
        assert f"grpc.reflection.{version}.ServerReflection" in found["reflected"][version]
    assert set(found["seen"]) <= {"OK", "UNAVAILABLE with pushback", "UNAVAILABLE"}
    assert found["seen"]["UNAVAILABLE with pushback"] >= _WORKERS
    # Each worker's connection was closed.
    assert found["seen"]["UNAVAILABLE"] == _WORKERS
