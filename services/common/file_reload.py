"""Read certificates, tokens and lists of callers from files, again whenever the files change."""

import logging
import os
import stat
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar

from services.common.errors import UsageError

# The CAs of a whole system have a quarter of a megabyte.
MAX_FILE_BYTES = 4 * 2**20
_INITIAL_ATTEMPTS = 3
_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)


class ReloadResult(Enum):
    """The outcome of a check of the files. A failure is reported once for each change."""

    UNCHANGED = "unchanged"
    RELOADED = "done"
    FAILED = "failed"


class ReloadingFile(Generic[_Value]):
    """The value of one or more files. If they become invalid or are removed, the last valid value is kept.

    `read` raises UsageError, whose text is logged, so it must not contain a secret. `on_reload` is called for
    every check that found a change.

    State: `value`, which other threads may read; `_last_state`, the files' state at the last check.
    """

    def __init__(
        self,
        paths: Sequence[str],
        read: Callable[[], _Value],
        *,
        on_reload: Callable[[ReloadResult], None] = lambda _: None,
    ) -> None:
        self._paths = paths
        self._read = read
        self._on_reload = on_reload
        # The files may be in the middle of being replaced one after the other.
        for _ in range(_INITIAL_ATTEMPTS):
            self._last_state = self._current_state()
            try:
                self.value = read()
            except UsageError:
                if self._current_state() == self._last_state:
                    raise
            else:
                if self._current_state() == self._last_state:
                    return
        self.value = read()

    def reload_if_changed(self) -> ReloadResult:
        """Read the files again if they changed. Symbolic links are followed, since Kubernetes swaps them."""
        now = self._current_state()
        if now == self._last_state:
            return ReloadResult.UNCHANGED
        self._last_state = now
        try:
            value, failure = self._read(), None
        except UsageError as error:
            value, failure = self.value, error
        # Some of the files may be old ones. The next check reads all of them again.
        if self._current_state() != now:
            self._last_state = ()
            return ReloadResult.UNCHANGED
        if failure is not None:
            _log.warning("%s; going on with what was there before", failure)
        else:
            self.value = value
            _log.debug("read again: %s", ", ".join(self._paths))
        found = ReloadResult.RELOADED if failure is None else ReloadResult.FAILED
        self._on_reload(found)
        return found

    def _current_state(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_file_state, self._paths))


def read_file(path: str, *, flag_name: str) -> bytes:
    """Return the content of a regular file of at most MAX_FILE_BYTES. Raises UsageError."""
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                message = f"{flag_name} {path}: it is not a file"
                raise UsageError(message)
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        message = f"{flag_name} {path}: {error.strerror}"
        raise UsageError(message) from error
    if len(content) > MAX_FILE_BYTES:
        message = f"{flag_name} {path}: it has more than {MAX_FILE_BYTES // 2**20} MiB"
        raise UsageError(message)
    return content


def _open_nonblocking(path: str, flags: int) -> int:
    """Open a file without waiting: a FIFO would block until a writer opens it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _file_state(path: str) -> tuple[int, ...] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    # ctime, so that a change of permissions counts as well.
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size
