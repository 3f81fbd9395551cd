"""A local folder: hidden temporary files, renamed into place when they are whole."""

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

from services.common.file_names import is_input
from services.common.storage.errors import (
    AlreadyDoneError,
    FileMissingError,
    InputChangedError,
    OutputConflictError,
    StorageError,
)
from services.common.storage.input_listing import NameCounts
from services.common.storage.protocol import ABSENT, ExistingOutput, FileInfo

_READ_BYTES = 2**20
_TEMPORARY_SUFFIX = ".augmenter-tmp"
_IS_A_FOLDER = "a folder stands there"


class LocalStore:
    """The files under `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def is_unordered(self) -> bool:
        """Never: `list` sorts the names."""
        return False

    def uri(self, name: str) -> str:
        """The path."""
        return str(self._root / name)

    async def list(self, *, after: str = "", listing: NameCounts | None = None) -> AsyncIterator[FileInfo]:
        """Links to files are followed, links to folders are not."""
        with _translate_errors(str(self._root)):
            names = await asyncio.to_thread(lambda: sorted(self._list_names(listing), key=str.encode))
            for name in names[bisect_right(names, after.encode(), key=str.encode) :]:
                if item := self._info_or_none(name):
                    yield item

    async def explain_empty(self) -> str:
        """There is nothing to add."""
        return ""

    def _list_names(self, listing: NameCounts | None) -> Iterator[str]:
        if not self._root.exists():  # an OUTPUT that is not made yet has no files
            return
        for folder, _, names in os.walk(self._root, onerror=_reraise):
            for name in names:
                relative = Path(folder, name).relative_to(self._root).as_posix()
                if is_input(relative) and _is_encodable(relative):
                    yield relative
                elif listing is not None:
                    listing.count_ignored(relative)

    def _info_or_none(self, name: str) -> FileInfo | None:
        """None: no file, a link to nowhere, or gone since the listing."""
        try:
            return self._info(name) if self._path(name).is_file() else None
        except FileNotFoundError:
            return None

    async def get_info(self, name: str) -> FileInfo:
        """One file."""
        with _translate_errors(self.uri(name)):
            return self._info(name)

    async def read(self, item: FileInfo) -> AsyncGenerator[bytes]:
        """The file's bytes; checked at the end against what `item` says."""
        with _translate_errors(self.uri(item.name)):
            file = await asyncio.to_thread(self._path(item.name).open, "rb")
        with file:  # a buffered file: its lock keeps `close` behind a read that was abandoned
            while data := await self._read_chunk(item.name, file):
                yield data
            with _translate_errors(self.uri(item.name)):
                if _version(os.fstat(file.fileno())) != item.version:
                    raise InputChangedError

    async def _read_chunk(self, name: str, file: BinaryIO) -> bytes:
        with _translate_errors(self.uri(name)):
            return await asyncio.to_thread(file.read, _READ_BYTES)

    async def check_writable(self) -> None:
        """Make the folder, and see that files can be made in it."""
        with _translate_errors(str(self._root)):
            self._root.mkdir(parents=True, exist_ok=True)
            if not os.access(self._root, os.W_OK | os.X_OK):
                raise StorageError(uri=str(self._root), reason="not writable")

    async def existing_output(self, name: str, source: FileInfo) -> ExistingOutput | None:
        """The output carries its input's time of modification."""
        with _translate_errors(self.uri(name)):
            try:
                status = self._path(name).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return ExistingOutput(_version(status), is_from_input=status.st_mtime_ns == source.modified_ns)

    def create(self, name: str, source: FileInfo, *, expected_version: str | None = None) -> "LocalUpload":
        """Begin `name`."""
        with _translate_errors(self.uri(name)):
            return LocalUpload(
                self._path(name), modified_ns=source.modified_ns, expected_version=expected_version
            )

    async def remove(self, name: str) -> None:
        """Remove `name` if it is there."""
        with _translate_errors(self.uri(name)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._path(name).unlink()

    def _info(self, name: str) -> FileInfo:
        status = self._path(name).stat()
        return FileInfo(name, status.st_size, _version(status), status.st_mtime_ns)

    def _path(self, name: str) -> Path:
        """The path of `name`, which a bucket may have given: it must not lead anywhere else."""
        if not name or any(part in {"", ".", ".."} for part in name.split("/")):
            raise StorageError(uri=f"{self._root}/{name}", reason="not a name for a local file")
        return self._root / name


class LocalUpload:
    """A hidden file beside the one to be, locked by its writer; removed unless completed."""

    def __init__(self, path: Path, *, modified_ns: int, expected_version: str | None) -> None:
        self._path = path
        self._modified_ns = modified_ns
        self._expected_version = expected_version
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
        self._file: BinaryIO | None = None

    async def __aenter__(self) -> Self:
        """Make the folder and the file; remove what a killed run left of this one."""
        with _translate_errors(str(self._path)):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_dir():
                raise StorageError(uri=str(self._path), reason=_IS_A_FOLDER)
            for stale in self._path.parent.glob(
                f".{_escape_glob(self._path.name)}.????????{_TEMPORARY_SUFFIX}"
            ):
                _remove_abandoned(stale)
            self._file = _create_locked(self._temporary)
        return self

    async def write(self, data: bytes) -> None:
        """Add bytes."""
        assert self._file  # noqa: S101 - entered
        with _translate_errors(str(self._path)):
            await asyncio.to_thread(self._file.write, data)

    async def complete(self) -> None:
        """Make it durable, then let it appear in one step."""
        with _translate_errors(str(self._path)):
            await asyncio.to_thread(self._complete)

    def _complete(self) -> None:
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
        """A look just before: that narrows the race; two at the same instant both write it, each whole."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        if self._expected_version is None or self._expected_version == (_version(there) if there else ABSENT):
            return
        if there and stat.S_ISDIR(there.st_mode):  # of a key that goes on behind this one's name and "/"
            raise StorageError(uri=str(self._path), reason=_IS_A_FOLDER)
        if there and there.st_mtime_ns == self._modified_ns:
            raise AlreadyDoneError
        raise OutputConflictError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary file, which is no longer there after `complete`."""
        with contextlib.suppress(OSError):  # of no use to anyone: another error is on its way
            if self._file:
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def _create_locked(path: Path) -> BinaryIO:
    """A new file that others see is in work; made again if it was taken for abandoned before its lock."""
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
    """The lock goes with its process, however that ended."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


def _version(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _is_encodable(name: str) -> bool:
    """Whether the name is text: others cannot be told to anyone."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _escape_glob(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _reraise(error: OSError) -> None:
    raise error


@contextmanager
def _translate_errors(place: str) -> Iterator[None]:
    """Name the place in every error of the operating system."""
    try:
        yield
    except OSError as error:
        kind = FileMissingError if isinstance(error, FileNotFoundError) else StorageError
        raise kind(uri=place, reason=error.strerror or str(error)) from error
    except ValueError as error:  # a name that no file can have
        raise StorageError(uri=place, reason=str(error)) from error
