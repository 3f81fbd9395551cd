"""The bearer token that authenticates calls. Its file may be replaced at any time."""

import re
from collections.abc import Callable
from pathlib import Path

from services.common.errors import UsageError
from services.common.file_reload import ReloadingFile, ReloadResult, read_file
from services.common.grpc_target import is_local_target
from services.common.redaction import warn_if_world_readable

_TOKEN = re.compile(rb"[\x21-\x7e]+")


class Token:
    """A token that is read again when its file changes. Logs and errors never show it."""

    def __init__(
        self,
        path: str,
        *,
        flag_name: str = "--token-file",
        on_reload: Callable[[ReloadResult], None] = lambda _: None,
    ) -> None:
        self._path = path
        self._flag_name = flag_name
        self.file = ReloadingFile([path], self._read, on_reload=on_reload)
        warn_if_world_readable(Path(path), flag_name=flag_name)

    def metadata(self) -> tuple[str, str]:
        """Return the metadata of a call. While the file cannot be read, the last token is used."""
        self.file.reload_if_changed()
        return ("authorization", f"Bearer {self.file.value}")

    def _read(self) -> str:
        token = read_file(self._path, flag_name=self._flag_name).strip()
        if not _TOKEN.fullmatch(token):
            message = f"{self._flag_name} {self._path}: it is empty, or not one line of printable ASCII"
            raise UsageError(message)
        return token.decode()


def require_encrypted(target: str, *, token_file: str | None, tls_ca: str | None, prefix: str = "--") -> None:
    """Raise UsageError if a token would be sent unencrypted to another machine."""
    if token_file and not tls_ca and not is_local_target(target):
        message = (
            f"{prefix}token-file: {target} would get it in the clear; {prefix}tls-ca encrypts the way there"
        )
        raise UsageError(message)
