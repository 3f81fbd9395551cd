"""Errors of folders and buckets. The message of each is one sentence that a user can act on."""

from services.common.errors import FileError


class InputChangedError(FileError):
    """The input has changed since it was listed."""

    def __init__(self) -> None:
        super().__init__("the input changed while it was read; run again")


class AlreadyDoneError(FileError):
    """Another process has written the same output from the same input, so nothing is left to do."""

    def __init__(self) -> None:
        super().__init__("another process made this output meanwhile")


class OutputConflictError(FileError):
    """Another process has written the output, or has aborted its upload."""

    def __init__(self) -> None:
        super().__init__("another process is writing the same output; run again")


class StorageError(FileError):
    """A folder or bucket cannot be listed, read or written."""

    def __init__(self, *, uri: str, reason: str) -> None:
        super().__init__(f"{uri}: {reason}")
        self.uri = uri
        self.reason = reason


class FileMissingError(StorageError):
    """A file or an object does not exist, or no longer."""


class FileArchivedError(StorageError):
    """An object is in cold storage and not restored, so it cannot be read."""
