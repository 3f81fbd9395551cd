"""Keep the path of a Unix socket for one process, for as long as that process lives."""

import fcntl
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from services.common.errors import CommandError

_PROBE_TIMEOUT_SECONDS = 1.0


class UnixSocketLock:
    """Exclusive use of a path. Without it, gRPC removes any socket that it finds there, in use or not.

    The lock is on a file beside the socket, with the descriptor `lock_fd`. It ends with the process, however
    that ends. So of two proxies that start at once one is refused, and the socket of a dead process is taken
    over.
    """

    def __init__(self, address: str, *, flag_name: str = "--listen") -> None:
        """Lock the path, and check that nothing uses it. Raise CommandError otherwise."""
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
            lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise self._error(path + f": {error.strerror}") from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock_fd)
            raise self._error("another proxy listens there already") from error
        return lock_fd

    def _check_unused(self, path: str) -> None:
        """Raise if a program listens on the path that does not use the lock, or if it is not a socket."""
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(Path(path).lstat().st_mode):
                raise self._error("what is there is no socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_TIMEOUT_SECONDS)
            try:
                probe.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                return
            except TimeoutError:
                # The other program listens, but is too busy to accept.
                pass
            except OSError as error:
                raise self._error(error.strerror or str(error)) from error
        raise self._error("another program listens there already")

    def _error(self, reason: str) -> CommandError:
        return CommandError(f"{self._flag_name} {self._address}: {reason}")
