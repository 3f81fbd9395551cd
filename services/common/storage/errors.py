"""Errors of folders and buckets. Each message is one sentence that a user can act on."""

from services.common.errors import FileError


class InputChangedError(FileError):
    """The content of an input is no longer the one that was listed."""

    def __init__(self) -> None:
        super().__init__("the input changed while it was read; run again")


class AlreadyDoneError(FileError):
    """Another process has made the same output from the same input: nothing is left to do."""

    def __init__(self) -> None:
        super().__init__("another process made this output meanwhile")


class OutputConflictError(FileError):
    """Another process has written the output, or has aborted our upload of it."""

    def __init__(self) -> None:
        super().__init__("another process is writing the same output; run again")


class StorageError(FileError):
    """A folder or a bucket cannot be listed, read or written."""

    def __init__(self, *, uri: str, reason: str) -> None:
        super().__init__(f"{uri}: {reason}")
        self.uri = uri
        self.reason = reason


class FileMissingError(StorageError):
    """A file or an object does not exist."""


class FileArchivedError(StorageError):
    """An object is in cold storage and not restored: it cannot be read."""
