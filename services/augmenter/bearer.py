"""The bearer token that says who asks: in a file, which may be written anew at any time."""

import logging
import re
from pathlib import Path

from services.common.errors import UsageError

_TOKEN = re.compile(rb"[\x21-\x7e]+")
_log = logging.getLogger("augmenter")


class Token:
    """Read again whenever the file is another. Neither logs nor errors ever show what it holds.

    State: `_value`, the last that could be read, and `_seen`, what the file was then; `_told`, what was said
    of a file that could not be read since.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._told = ""
        try:
            self._value = self._read()
        except (OSError, ValueError) as error:
            message = f"--token-file {path}: {_reason(error)}"
            raise UsageError(message) from None

    def metadata(self) -> tuple[str, str]:
        """What to send with a call. While the file cannot be read, the last token is."""
        try:
            if self._state() != self._seen:
                self._value = self._read()
            self._told = ""
        except (OSError, ValueError) as error:
            reason = _reason(error)
            if reason != self._told:
                _log.warning("--token-file %s: %s; going on with the last token", self._path, reason)
            self._told = reason
        return ("authorization", f"Bearer {self._value}")

    def _read(self) -> str:
        seen = self._state()  # before it is read: what is written meanwhile is read the next time
        token = self._path.read_bytes().strip()
        if not _TOKEN.fullmatch(token):
            raise ValueError("it is empty, or not one line of printable ASCII")
        self._seen = seen
        return token.decode()

    def _state(self) -> tuple[int, ...]:
        status = self._path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
