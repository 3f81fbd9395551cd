"""The interface of a folder of files, local or in a bucket."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from services.common.storage.input_listing import NameCounts

ABSENT = ""
"""The version of a file that does not exist."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file as it was listed.

    `name` is relative to its storage, with "/". `version` changes when the content does. `is_archived`: an
    object in cold storage that is not restored, so that it cannot be read.
    """

    name: str
    size_bytes: int
    version: str
    modified_ns: int
    is_archived: bool = False

    @property
    def state(self) -> tuple[str, bool]:
        """Return what changes when the file can be processed again. A restore keeps the version."""
        return self.version, self.is_archived


@dataclass(frozen=True, slots=True)
class ExistingOutput:
    """An output that exists: its own version, and whether it was made from the input in question."""

    version: str
    is_from_input: bool


class Upload(Protocol):
    """A file that is being written. It appears as a whole at `complete`, or not at all."""

    async def write(self, data: bytes) -> None:
        """Append bytes."""

    async def complete(self) -> None:
        """Make the file appear."""

    async def __aenter__(self) -> Self:
        """Start writing."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Discard the file unless it was completed."""


class Storage(Protocol):
    """A local folder, or a prefix of a bucket. Every failure is a StorageError that names the file."""

    @property
    def is_unordered(self) -> bool:
        """Whether a listing was not in the order of the names."""

    def uri(self, name: str) -> str:
        """Return the full address of a file, for messages."""

    def list(self, *, after: str = "", name_counts: NameCounts | None = None) -> AsyncIterator[FileInfo]:
        """Yield every input file at any depth whose name is behind `after`, in the UTF-8 order of the names.

        A server without an order yields them in any order, some perhaps twice. Names that are no input's are
        counted in `name_counts`.
        """

    async def explain_empty(self) -> str:
        """Return why there is no file, or "". Raise UsageError if this is a file and not a folder."""

    async def get_info(self, name: str) -> FileInfo:
        """Return one file."""

    def read(self, file: FileInfo) -> AsyncGenerator[bytes]:
        """Yield the content in chunks. Raise InputChangedError if the file is no longer the one in `file`."""

    async def check_writable(self) -> None:
        """Raise StorageError if files cannot be written here."""

    async def existing_output(self, name: str, source: FileInfo) -> ExistingOutput | None:
        """Return the output `name` of the input `source`, or None if it does not exist."""

    def create(self, name: str, source: FileInfo, *, expected_version: str | None = None) -> Upload:
        """Return an upload of `name`, which is marked as made from `source`.

        `expected_version` is the version that it may replace, ABSENT if none. Of several writers all but the
        first get OutputConflictError, where the storage can detect that. None: replace any version.
        """

    async def remove(self, name: str) -> None:
        """Remove `name` if it exists."""
