"""The project's services as processes: started, awaited by their `ready` line, and always ended."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.request import urlopen

READY_TIMEOUT_SECONDS = 60
ROOT = Path(__file__).parents[2]


class ServiceProcess:
    """One of the project's servers as a process. The constructor waits for its `ready` line."""

    def __init__(self, module: str, args: Sequence[str], *, env: Mapping[str, str], cwd: Path | None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment() | {"PYTHONPATH": str(ROOT)} | dict(env),
            cwd=cwd,
        )
        self._stdout: queue.Queue[str | None] = queue.Queue()
        self.log_lines: list[str] = []
        self._readers = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.ready: dict[str, Any] = self._wait_ready()

    @property
    def target(self) -> str:
        """Return the first address on which the server listens."""
        return str(self.ready["listen"][0])

    @property
    def http_url(self) -> str:
        """Return the base URL of its HTTP port."""
        return f"http://{self.ready['http']}"

    @cached_property
    def replica_id(self) -> str:
        """Return the id of a proxy among the replicas."""
        with urlopen(f"{self.http_url}/replica", timeout=10) as response:
            return str(response.read().decode().strip())

    @property
    def log(self) -> str:
        """Return what the process has written to standard error so far."""
        return "".join(self.log_lines)

    def stop(self, signal_number: int = signal.SIGTERM, timeout_seconds: float = 45) -> int:
        """Send a signal, wait for the end of the process and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        code = self.process.wait(timeout_seconds)
        for reader in self._readers:
            reader.join(5)
        return code

    def _read_stdout(self) -> None:
        assert self.process.stdout
        with self.process.stdout as lines:
            for line in lines:
                self._stdout.put(line)
        self._stdout.put(None)

    def _read_stderr(self) -> None:
        assert self.process.stderr
        with self.process.stderr as lines:
            self.log_lines.extend(lines)

    def _wait_ready(self) -> dict[str, Any]:
        try:
            line = self._stdout.get(timeout=READY_TIMEOUT_SECONDS)
        except queue.Empty:
            line = None
        if line is None:
            self.process.kill()
            self.process.wait()
            message = f"no ready line; its log:\n{self.log}"
            raise AssertionError(message)
        ready: dict[str, Any] = json.loads(line)
        assert ready["event"] == "ready"
        return ready


@contextmanager
def run_service(
    module: str, *args: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[ServiceProcess]:
    """Run a service. It is killed at the end of the block if it is still running."""
    process = ServiceProcess(module, args, env=env or {}, cwd=cwd)
    try:
        yield process
    finally:
        process.stop(signal.SIGKILL)


def model_stub(*args: str) -> AbstractContextManager[ServiceProcess]:
    """Run a model stub on a free port. `args` are flags of `model-stub serve`."""
    return run_service("services.model_stub", "serve", "--listen", "127.0.0.1:0", *args)


def cache_proxy(*args: str, env: Mapping[str, str] | None = None) -> AbstractContextManager[ServiceProcess]:
    """Run a cache proxy on free ports. `args` are its other flags, `--model-target` among them."""
    free = ("--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--drain-delay", "0s")
    return run_service("services.cache_proxy", "serve", *free, *args, env=env)


def run_command(
    module: str, *args: str, env: Mapping[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's commands to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
        input=stdin,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
    )


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the project's variables and with bytecode caching.

    Without bytecode caching each start compiles all imported modules, which takes a second.
    """
    prefixes = ("CACHE_PROXY_", "AUGMENTER_", "MODEL_STUB_", "AWS_", "OTEL_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def read_stub_log(log: Path) -> list[dict[str, Any]]:
    """Return the calls in a model stub's log, in the order in which they ended."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
