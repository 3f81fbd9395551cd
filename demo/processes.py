"""Run the project's servers as processes that end with the block that started them."""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_READY_SECONDS = 60


def environment() -> dict[str, str]:
    """Return the environment of this process, with gRPC to this machine kept off any HTTP proxy."""
    return os.environ | {"no_grpc_proxy": "127.0.0.1,localhost"}


class ServerFailedError(Exception):
    """A server ended, or printed nothing, before it was ready."""


class Server:
    """A running server, with the addresses of its `ready` line."""

    def __init__(self, process: "subprocess.Popen[str]", ready: dict[str, Any]) -> None:
        self._process = process
        self.pid = process.pid
        self.target: str = ready["listen"][0]
        self.http: str = ready.get("http", "")

    def kill(self) -> None:
        """Kill the process, as a crash would."""
        self._process.kill()
        self._process.wait()


@contextmanager
def running_server(module: str, args: Sequence[str], *, log: Path) -> Iterator[Server]:
    """Start `python -m module args`, wait for its `ready` line, and stop it at the end."""
    command = [sys.executable, "-m", module, *args]
    with log.open("a") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment(),
            # Ctrl-C reaches only this process, which then stops the servers.
            start_new_session=True,
        )
    try:
        yield Server(process, _wait_ready(process, module, log))
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def _wait_ready(process: "subprocess.Popen[str]", module: str, log: Path) -> dict[str, Any]:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        line = process.stdout.readline() if selector.select(_READY_SECONDS) else ""
    if not line:
        last = log.read_text().strip().splitlines()[-1:]
        raise ServerFailedError(f"{module} did not start: {''.join(last) or 'it said nothing'}")
    ready: dict[str, Any] = json.loads(line)
    return ready
