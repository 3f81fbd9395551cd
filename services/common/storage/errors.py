"""Errors of folders and buckets. Each is one sentence that a person can act on."""

from services.common.errors import FileError


class InputChangedError(FileError):
    """The input is not what it was when it was listed."""

    def __init__(self) -> None:
        super().__init__("the input changed while it was read; run again")


class AlreadyDoneError(FileError):
    """Another process made the same output from the same input meanwhile: nothing is left to do."""

    def __init__(self) -> None:
        super().__init__("another process made this output meanwhile")


class OutputConflictError(FileError):
    """Another process wrote the output, or ended our upload of it, meanwhile."""

    def __init__(self) -> None:
        super().__init__("another process is writing the same output; run again")


class StorageError(FileError):
    """A folder or bucket cannot be listed, read or written."""

    def __init__(self, *, uri: str, reason: str) -> None:
        super().__init__(f"{uri}: {reason}")
        self.uri = uri
        self.reason = reason


class FileMissingError(StorageError):
    """A file or an object is not there (any more)."""


class FileArchivedError(StorageError):
    """An object is in cold storage and not restored: it cannot be read now."""
