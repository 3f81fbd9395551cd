"""A Unix socket's path is one process's alone, for as long as that lives."""

import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from services.common.errors import CommandError

_CONNECT_SECONDS = 1.0


class SocketPath:
    """A path that nobody else listens on. gRPC removes whatever socket it finds there, in use or not.

    `lock` is the descriptor of a lock on a file beside it. It ends with the process, however that ends: so of
    two that start at once one is refused, and what a dead one left is taken over. Raises CommandError.
    """

    def __init__(self, address: str, *, flag_name: str = "--listen") -> None:
        self._address = address
        self._flag_name = flag_name
        path = address.removeprefix("unix:")
        path = path.removeprefix("//") if path.startswith("///") else path
        self.lock = self._locked(f"{path}.lock")
        try:
            self._look(path)
        except BaseException:
            os.close(self.lock)
            raise

    def _locked(self, path: str) -> int:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._refused(path + f": {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise self._refused("another proxy listens there already") from error
        return lock

    def _look(self, path: str) -> None:
        """Who else listens there: not all that do know of the lock."""
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(Path(path).lstat().st_mode):
                raise self._refused("what is there is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_CONNECT_SECONDS)
            try:
                probe.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                return
            except TimeoutError:  # it listens, and does not get to it
                pass
            except OSError as error:
                raise self._refused(error.strerror or str(error)) from error
        raise self._refused("somebody listens there already")

    def _refused(self, why: str) -> CommandError:
        return CommandError(f"{self._flag_name} {self._address}: {why}")
