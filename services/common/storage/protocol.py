"""The protocol of storage: a local folder, or a prefix of an S3 bucket."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from services.common.storage.input_listing import NameCounts


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file as found by a listing or a lookup.

    `name` is relative to its storage, with "/". `version` changes when the content does. `is_archived`: an
    object in cold storage that is not restored, so it cannot be read.
    """

    name: str
    size_bytes: int
    version: str
    modified_ns: int
    is_archived: bool = False

    @property
    def state(self) -> tuple[str, bool]:
        """Return what changes when the file has to be processed again. A restore keeps the version."""
        return self.version, self.is_archived


@dataclass(frozen=True, slots=True)
class ExistingOutput:
    """An existing output: its own version, and whether it was made from the input in question."""

    version: str
    is_from_input: bool


# The version of an object that does not exist.
ABSENT = ""


class Upload(Protocol):
    """An output being written. It appears as a whole at `complete`, or not at all."""

    async def write(self, data: bytes) -> None:
        """Write the next bytes."""

    async def complete(self) -> None:
        """Publish the output."""

    async def __aenter__(self) -> Self:
        """Begin the upload."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Abort the upload, unless it was completed."""


class Storage(Protocol):
    """A local folder, or a prefix of a bucket. Every failure is a StorageError that names the URI."""

    @property
    def is_unordered(self) -> bool:
        """Return whether a listing has shown that names are not in order."""

    def uri(self, name: str) -> str:
        """Return the full address of a name, for messages."""

    def list(self, *, after: str = "", name_counts: NameCounts | None = None) -> AsyncIterator[FileInfo]:
        """Yield every file to augment at any depth, in UTF-8 order of names, with names greater than `after`.

        If the server has no order, files come in any order, and some perhaps twice. Ignored names are counted
        in `name_counts`.
        """

    async def explain_empty(self) -> str:
        """Return why there is no file, or "". Raises UsageError if the URI is a file and not a folder."""

    async def get_info(self, name: str) -> FileInfo:
        """Return the information about one file."""

    def read(self, file: FileInfo) -> AsyncGenerator[bytes]:
        """Yield the file's bytes in chunks. Raises InputChangedError if it is not the version in `file`."""

    async def check_writable(self) -> None:
        """Raise StorageError if files cannot be written here."""

    async def existing_output(self, name: str, source: FileInfo) -> ExistingOutput | None:
        """Return the output `name` if it exists, and whether it was made from `source`."""

    def create(self, name: str, source: FileInfo, *, expected_version: str | None = None) -> Upload:
        """Return an upload of `name`, to be marked as made from `source`.

        `expected_version` is the version that the upload may replace, or ABSENT. Of several writers, a later
        one gets OutputConflictError, if the storage can detect it. None: the upload replaces anything.
        """

    async def remove(self, name: str) -> None:
        """Remove `name` if it exists."""
