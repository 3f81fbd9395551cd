"""Base classes of the errors that a command shows to its user."""

from services.common.units import format_size


class CommandError(Exception):
    """Ends a command with one line on standard error and `exit_code`."""

    exit_code = 1


class UsageError(CommandError):
    """The arguments of a command are invalid: exit code 2."""

    exit_code = 2


class FileError(CommandError):
    """One file cannot be processed. The others are not affected."""


class CorruptInputError(FileError):
    """The compressed input cannot be decoded to its end."""


class UnreadableFormatError(FileError):
    """The file does not hold lines of JSON."""


class WindowTooLargeError(FileError):
    """Decompressing the input needs more memory than one file may use."""

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"its zstd window is over {format_size(limit_bytes)}; compress it again without --long or "
            "--ultra, or raise --max-zstd-window"
        )
