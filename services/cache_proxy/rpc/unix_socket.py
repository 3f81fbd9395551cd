"""A Unix socket's path is one process's alone, for as long as that lives."""

import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from services.common.errors import CommandError

_PROBE_TIMEOUT_SECONDS = 1.0


class UnixSocketLock:
    """A path that nobody else listens on. gRPC removes whatever socket it finds there, in use or not.

    `lock` is the descriptor of a lock on a file beside it. It ends with the process, however that ends: so of
    two that start at once one is refused, and what a dead one left is taken over. Raises CommandError.
    """

    def __init__(self, address: str, *, flag_name: str = "--listen") -> None:
        self._address = address
        self._flag_name = flag_name
        path = address.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        self.lock_fd = self._acquire_lock(f"{path}.lock")
        try:
            self._check_unused(path)
        except BaseException:
            os.close(self.lock_fd)
            raise

    def _acquire_lock(self, path: str) -> int:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._error(path + f": {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise self._error("another proxy listens there already") from error
        return lock

    def _check_unused(self, path: str) -> None:
        """Who else listens there: not all that do know of the lock."""
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(Path(path).lstat().st_mode):
                raise self._error("what is there is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_TIMEOUT_SECONDS)
            try:
                probe.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                return
            except TimeoutError:  # it listens, and does not get to it
                pass
            except OSError as error:
                raise self._error(error.strerror or str(error)) from error
        raise self._error("somebody listens there already")

    def _error(self, why: str) -> CommandError:
        return CommandError(f"{self._flag_name} {self._address}: {why}")
