"""Read a secret from a file that a flag names."""

from pathlib import Path

from services.common.errors import UsageError
from services.common.file_reload import read_file
from services.common.redaction import warn_if_world_readable


def read_secret(path: str | None, *, flag_name: str) -> bytes | None:
    """Return the content of a secret file without its final newline, None without a path.

    Raises `UsageError` if the file cannot be read or is empty.
    """
    if path is None:
        return None
    secret = read_file(path, flag_name=flag_name).rstrip(b"\r\n")
    if not secret:
        message = f"{flag_name} {path}: the file is empty"
        raise UsageError(message)
    warn_if_world_readable(Path(path), flag_name=flag_name)
    return secret
