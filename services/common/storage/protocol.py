"""What the pipeline asks of a folder, wherever it is."""

from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from services.common.storage.input_listing import NameCounts


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file as it was when it was looked at. `version` changes when the content does.

    `is_archived`: an object in cold storage that is not restored, so it cannot be read.
    """

    name: str  # relative to its store, with "/"
    size_bytes: int
    version: str
    modified_ns: int
    is_archived: bool = False

    @property
    def state(self) -> tuple[str, bool]:
        """What changes when there is something new to do: a restore leaves the version as it is."""
        return self.version, self.is_archived


@dataclass(frozen=True, slots=True)
class ExistingOutput:
    """An output that is there: its own version, and whether it was made from the input in question."""

    version: str
    is_from_input: bool


ABSENT = ""  # no version of an object


class Upload(Protocol):
    """An output in the making: it appears whole at `complete`, or not at all."""

    async def write(self, data: bytes) -> None:
        """Add bytes."""

    async def complete(self) -> None:
        """Let it appear."""

    async def __aenter__(self) -> Self:
        """Begin."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        """Forget it, unless it was completed."""


class Storage(Protocol):
    """A local folder, or a prefix of a bucket. Every failure is a StoreError that names the place."""

    @property
    def is_unordered(self) -> bool:
        """Whether a listing has shown another order than that of the names."""

    def uri(self, name: str) -> str:
        """The full address of a name, for people."""

    def list(self, *, after: str = "", listing: NameCounts | None = None) -> AsyncIterator[FileInfo]:
        """Every file to augment, whatever its depth, by name in the order of UTF-8; those behind `after`.

        Where the server has no order: in any, some perhaps twice. Names that are ignored are counted in
        `listing`.
        """

    async def explain_empty(self) -> str:
        """Say why there is no file at all, or "". Raises UsageError if this is no folder but a file."""

    async def get_info(self, name: str) -> FileInfo:
        """One file."""

    def read(self, item: FileInfo) -> AsyncGenerator[bytes]:
        """The file's bytes in pieces; InputChangedError if it is no longer what `item` says."""

    async def check_writable(self) -> None:
        """Fail now if files could not be written here."""

    async def existing_output(self, name: str, source: FileInfo) -> ExistingOutput | None:
        """The output `name`, if it is there."""

    def create(self, name: str, source: FileInfo, *, expected_version: str | None = None) -> Upload:
        """Begin `name`, to be marked as made from `source`.

        `onto` is the version that it may replace, NOTHING if there was none: whoever comes second among
        several writers is told by OutputTakenError, where the store can tell. None: it replaces anything.
        """

    async def remove(self, name: str) -> None:
        """Remove `name` if it is there."""
