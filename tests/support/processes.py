"""Real processes for tests: started, waited for by what they say, and always ended."""

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
    """One of the project's servers as a process, from its `ready` line on."""

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
        """The first address on which it listens."""
        return str(self.ready["listen"][0])

    @property
    def http_url(self) -> str:
        """Its HTTP base URL."""
        return f"http://{self.ready['http']}"

    @cached_property
    def replica_id(self) -> str:
        """A proxy's name among the replicas."""
        with urlopen(f"{self.http_url}/replica", timeout=10) as response:
            return str(response.read().decode().strip())

    @property
    def log(self) -> str:
        """What it has written to standard error so far."""
        return "".join(self.log_lines)

    def stop(self, signal_number: int = signal.SIGTERM, timeout_seconds: float = 45) -> int:
        """Send a signal, wait for the end, return the exit code."""
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
    """A running service, killed at the end if the test did not stop it."""
    running = ServiceProcess(module, args, env=env or {}, cwd=cwd)
    try:
        yield running
    finally:
        running.stop(signal.SIGKILL)


def model_stub(*args: str) -> AbstractContextManager[ServiceProcess]:
    """A model stub on a free port; see `model-stub serve --help` for its flags."""
    return run_service("services.model_stub", "serve", "--listen", "127.0.0.1:0", *args)


def cache_proxy(*args: str, env: Mapping[str, str] | None = None) -> AbstractContextManager[ServiceProcess]:
    """A cache proxy on free ports; `--model-target` and the rest are the test's."""
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
    """This process's environment without the project's own variables, and with compiled modules.

    Whoever keeps Python from writing bytecode makes every start compile all that it imports: a second each.
    """
    prefixes = ("CACHE_PROXY_", "AUGMENTER_", "MODEL_STUB_", "AWS_", "OTEL_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def read_stub_log(log: Path) -> list[dict[str, Any]]:
    """The calls that a stub logged, oldest end first."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
