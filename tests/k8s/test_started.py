"""The programs start with the arguments and variables of the manifests and pass the pods' probes."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from scripts.k8s_check import build
from scripts.k8s_check.environment import environment
from scripts.k8s_check.objects import Container, containers
from tests.support.processes import ROOT, clean_environment, run_service

pytestmark = pytest.mark.k8s


@pytest.fixture(scope="module")
def manifests() -> list[build.Manifest]:
    """Return the manifests of the production overlay."""
    return build.kustomize(ROOT / "deploy" / "k8s" / "overlays" / "prod")


def test_proxy_with_the_manifests_settings_passes_its_probes(manifests: list[build.Manifest]) -> None:
    """Only addresses of other machines and files that are not here are replaced."""
    container = _container(manifests, "cache-proxy")
    local_values = {
        "CACHE_PROXY_MODEL_TARGET": "127.0.0.1:1",
        "CACHE_PROXY_CACHE_URL": "memory:",
        "CACHE_PROXY_LISTEN": "127.0.0.1:0",
        "CACHE_PROXY_HTTP_LISTEN": "127.0.0.1:0",
    }
    variables = environment(container, manifests).variables | local_values
    without_files = {name: value for name, value in variables.items() if not name.endswith("_FILE")}
    with run_service("services.cache_proxy", *container.spec["args"], env=without_files) as process:
        _probe(container, process.http_url)


def test_augmenter_with_the_manifests_settings_passes_its_probes(
    manifests: list[build.Manifest], tmp_path: Path
) -> None:
    """Only the places of files and the queue are replaced."""
    container = _container(manifests, "augmenter")
    (tmp_path / "raw").mkdir()
    local_values = {
        "AUGMENTER_INPUT": str(tmp_path / "raw"),
        "AUGMENTER_OUTPUT": str(tmp_path / "mod"),
        "AUGMENTER_HTTP_LISTEN": "127.0.0.1:0",
        "AUGMENTER_SQS_QUEUE_URL": "",
    }
    with _augmenter(
        container.spec["args"], environment(container, manifests).variables | local_values
    ) as http_url:
        _probe(container, http_url)


@contextmanager
def _augmenter(args: list[str], variables: dict[str, str]) -> Iterator[str]:
    command = [sys.executable, "-m", "services.augmenter", *args]
    environment = clean_environment() | variables
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            line = next(line for line in process.stderr if "/metrics" in line)
            found = re.search(r"http://[\d.:]+", line)
            assert found, line
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0


def _container(manifests: list[build.Manifest], program: str) -> Container:
    return next(one for one in containers(manifests) if one.program == program)


def _probe(container: Container, http_url: str) -> None:
    probes = [container.spec[kind]["httpGet"]["path"] for kind in container.spec if kind.endswith("Probe")]
    assert len(probes) >= 2
    for path in (*probes, "/metrics"):
        with urlopen(f"{http_url}{path}", timeout=10) as response:
            assert response.status == 200
