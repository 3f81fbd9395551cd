"""What is read of files, and read again when they become others: certificates, tokens, lists of callers."""

import logging
import os
import stat
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Generic, TypeVar

from services.common.errors import UsageError

MAX_FILE_BYTES = 4 * 2**20  # the CAs of a whole system are a quarter of a megabyte
_INITIAL_ATTEMPTS = 3
_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)


class ReloadResult(Enum):
    """What came of looking at the files again; a failure is told once, until they are others again."""

    UNCHANGED = "unchanged"
    RELOADED = "done"
    FAILED = "failed"


class ReloadingFile(Generic[_Value]):
    """`value` is the last that could be read: what is broken, or gone, changes nothing.

    `read` raises UsageError, whose words are logged, so they must not say what a secret is. `tell` hears of
    every look that did not find all as it was.

    State: `value`, which other threads may read, and `_seen`, what the files were at the last look.
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
        for _ in range(_INITIAL_ATTEMPTS):  # they may be replaced one after the other just now
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
        """Read them if they are others. Kubernetes swaps symbolic links: what they lead to counts."""
        now = self._current_state()
        if now == self._last_state:
            return ReloadResult.UNCHANGED
        self._last_state = now
        try:
            value, failure = self._read(), None
        except UsageError as error:
            value, failure = self.value, error
        if self._current_state() != now:  # half of it may be of yesterday: the next look finds it whole
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
    """A file's content, within bounds. Raises UsageError, also where one could wait: a FIFO, a device."""
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
    """Open a FIFO, too, whether or not anybody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _file_state(path: str) -> tuple[int, ...] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns, status.st_size  # ctime: rights count as well
