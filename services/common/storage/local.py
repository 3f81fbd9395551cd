"""A local folder. Files are written under a hidden temporary name and renamed when they are complete.

The writer stands beside the reader because both depend on the same versions and error texts; together they
are a few lines over the usual size.
"""

import asyncio
import contextlib
import fcntl
import os
import secrets
import stat
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from services.common.compat import override
from services.common.file_names import is_input
from services.common.storage.errors import (
    AlreadyDoneError,
    FileMissingError,
    InputChangedError,
    OutputConflictError,
    StorageError,
)
from services.common.storage.input_listing import NameCounts
from services.common.storage.protocol import ABSENT, ExistingOutput, FileInfo, Storage, Upload

_READ_BYTES = 2**20
_TEMPORARY_SUFFIX = ".augmenter-tmp"
_IS_A_FOLDER = "a folder stands there"


class LocalStore(Storage):
    """The files under `root`. Links to files are followed, links to folders are not.

    `is_strict=False` is for reading only: names that are not valid UTF-8 are listed, folders that may not be
    read are skipped, and a file may change while it is read.
    """

    def __init__(self, root: Path, *, is_strict: bool = True) -> None:
        self._root = root
        self._is_strict = is_strict

    @property
    @override
    def is_unordered(self) -> bool:
        return False

    @override
    def uri(self, name: str) -> str:
        return str(self._root / name)

    @override
    async def list(
        self, *, after: str = "", name_counts: NameCounts | None = None
    ) -> AsyncIterator[FileInfo]:
        with _translate_errors(str(self._root)):
            names = await asyncio.to_thread(lambda: sorted(self._list_names(name_counts), key=os.fsencode))
            for name in names[bisect_right(names, os.fsencode(after), key=os.fsencode) :]:
                if info := self._info_or_none(name):
                    yield info

    @override
    async def explain_empty(self) -> str:
        return ""

    def _list_names(self, name_counts: NameCounts | None) -> Iterator[str]:
        # OUTPUT may not exist yet.
        if not self._root.exists():
            return
        for folder, _, names in os.walk(self._root, onerror=self._on_walk_error):
            for name in names:
                relative = Path(folder, name).relative_to(self._root).as_posix()
                if is_input(relative) and (_is_encodable(relative) or not self._is_strict):
                    yield relative
                elif name_counts is not None:
                    name_counts.count_ignored(relative)

    def _on_walk_error(self, error: OSError) -> None:
        if self._is_strict or not isinstance(error, PermissionError):
            raise error

    def _info_or_none(self, name: str) -> FileInfo | None:
        """Return None for what is no file, for a broken link, and for a file that was removed meanwhile."""
        try:
            return self._info(name) if self._path(name).is_file() else None
        except FileNotFoundError:
            return None

    @override
    async def get_info(self, name: str) -> FileInfo:
        with _translate_errors(self.uri(name)):
            return self._info(name)

    @override
    async def read(self, file: FileInfo) -> AsyncGenerator[bytes]:
        with _translate_errors(self.uri(file.name)):
            opened = await asyncio.to_thread(self._path(file.name).open, "rb")
        # The lock of a buffered file lets `close` wait for a read that was abandoned in its thread.
        with opened:
            while data := await self._read_chunk(file.name, opened):
                yield data
            with _translate_errors(self.uri(file.name)):
                if self._is_strict and _version(os.fstat(opened.fileno())) != file.version:
                    raise InputChangedError

    async def _read_chunk(self, name: str, opened: BinaryIO) -> bytes:
        with _translate_errors(self.uri(name)):
            return await asyncio.to_thread(opened.read, _READ_BYTES)

    @override
    async def check_writable(self) -> None:
        with _translate_errors(str(self._root)):
            self._root.mkdir(parents=True, exist_ok=True)
            if not os.access(self._root, os.W_OK | os.X_OK):
                raise StorageError(uri=str(self._root), reason="not writable")

    @override
    async def existing_output(self, name: str, source: FileInfo) -> ExistingOutput | None:
        with _translate_errors(self.uri(name)):
            try:
                status = self._path(name).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        # An output carries the modification time of its input.
        return ExistingOutput(_version(status), is_from_input=status.st_mtime_ns == source.modified_ns)

    @override
    def create(self, name: str, source: FileInfo, *, expected_version: str | None = None) -> "LocalUpload":
        with _translate_errors(self.uri(name)):
            return LocalUpload(
                self._path(name), modified_ns=source.modified_ns, expected_version=expected_version
            )

    @override
    async def remove(self, name: str) -> None:
        with _translate_errors(self.uri(name)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._path(name).unlink()

    def _info(self, name: str) -> FileInfo:
        status = self._path(name).stat()
        return FileInfo(name, status.st_size, _version(status), status.st_mtime_ns)

    def _path(self, name: str) -> Path:
        """Return the path of `name`, which may come from a bucket: it must not lead out of the folder."""
        if not name or any(part in {"", ".", ".."} for part in name.split("/")):
            raise StorageError(uri=f"{self._root}/{name}", reason="not a name for a local file")
        return self._root / name


class LocalUpload(Upload):
    """A hidden file beside its final path, locked by its writer. It is removed unless completed."""

    def __init__(self, path: Path, *, modified_ns: int, expected_version: str | None) -> None:
        self._path = path
        self._modified_ns = modified_ns
        self._expected_version = expected_version
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
        self._file: BinaryIO | None = None

    @override
    async def __aenter__(self) -> Self:
        with _translate_errors(str(self._path)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_dir():
                raise StorageError(uri=str(self._path), reason=_IS_A_FOLDER)
            # Remove what killed runs left of this output.
            for stale in self._path.parent.glob(
                f".{_escape_glob(self._path.name)}.????????{_TEMPORARY_SUFFIX}"
            ):
                _remove_abandoned(stale)
            self._file = _create_locked(self._temporary)
        return self

    @override
    async def write(self, data: bytes) -> None:
        assert self._file  # noqa: S101 - entered
        with _translate_errors(str(self._path)):
            await asyncio.to_thread(self._file.write, data)

    @override
    async def complete(self) -> None:
        with _translate_errors(str(self._path)):
            await asyncio.to_thread(self._complete)

    def _complete(self) -> None:
        """Make the content durable, then rename the file into place."""
        assert self._file  # noqa: S101 - entered
        with self._file as file:
            file.flush()
            os.utime(file.fileno(), ns=(self._modified_ns, self._modified_ns))
            os.fsync(file.fileno())
            self._check_no_conflict()
            self._temporary.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _check_no_conflict(self) -> None:
        """Raise an error if another process has written the output.

        The check just before the rename only narrows the race: of two writers in the same instant both
        rename, each a whole file.
        """
        try:
            existing = self._path.stat()
        except FileNotFoundError:
            existing = None
        version = _version(existing) if existing else ABSENT
        if self._expected_version is None or self._expected_version == version:
            return
        # A folder appears here for an S3 key that continues this key with "/".
        if existing and stat.S_ISDIR(existing.st_mode):
            raise StorageError(uri=str(self._path), reason=_IS_A_FOLDER)
        if existing and existing.st_mtime_ns == self._modified_ns:
            raise AlreadyDoneError
        raise OutputConflictError

    @override
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After `complete` the temporary file no longer exists. If removing it fails, another error is already
        # on its way to the user.
        with contextlib.suppress(OSError):
            if self._file:
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _create_locked(path: Path) -> BinaryIO:
    """Create a file and lock it, so that other processes see that its writer is alive.

    Between creation and lock another process may remove it as abandoned. Then it is created again.
    """
    while True:
        file = path.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _remove_abandoned(path: Path) -> None:
    """Remove a temporary file unless its writer is alive. The system releases the lock of a dead process."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _is_encodable(name: str) -> bool:
    """Return whether the name is valid UTF-8. Other names cannot be written to messages and events."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escape_glob(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


@contextmanager
def _translate_errors(uri: str) -> Iterator[None]:
    """Turn errors of the operating system into StorageError with the file's path."""
    try:
        yield
    except OSError as error:
        kind = FileMissingError if isinstance(error, FileNotFoundError) else StorageError
        raise kind(uri=uri, reason=error.strerror or str(error)) from error
    except ValueError as error:
        # The name holds a character that no file name can hold.
        raise StorageError(uri=uri, reason=str(error)) from error
