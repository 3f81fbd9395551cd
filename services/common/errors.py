"""The base of every error that a command may show to its user."""

from services.common.units import format_size


class CommandError(Exception):
    """Ends a command with one clear line on standard error; `exit_code` is the process's."""

    exit_code = 1


class UsageError(CommandError):
    """What the user asked for cannot be meant: exit code 2."""

    exit_code = 2


class FileError(CommandError):
    """One file cannot be done; the others go on."""


class CorruptInputError(FileError):
    """The compressed input cannot be read to its end."""


class UnreadableFormatError(FileError):
    """The file holds something else than lines of JSON."""


class WindowTooLargeError(FileError):
    """To read the compressed input takes more memory than one file may have."""

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"its zstd window is over {format_size(limit_bytes)}; compress it again without --long or "
            "--ultra, or raise --max-zstd-window"
        )
