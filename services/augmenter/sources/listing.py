"""Lists the files to process, by merging the sorted listings of INPUT and OUTPUT page by page."""

import logging
import re
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.augmenter.domain import FileTask
from services.common.codec import format_for_name
from services.common.storage.errors import StorageError
from services.common.storage.input_listing import NameCounts
from services.common.storage.protocol import ABSENT, FileInfo, Storage
from services.common.tasks import gather_or_cancel

_HEAD_CONCURRENCY = 32
_SHARD_PATTERN = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of the files that one process takes.

    A hash of the file's name decides, so that processes need no coordination.
    """

    index: int = 0
    count: int = 1

    def contains(self, name: str) -> bool:
        """Return whether a file belongs to this shard."""
        return zlib.crc32(name.encode()) % self.count == self.index


def parse_shard(text: str) -> tuple[int, int]:
    """Parse `I/N`. Raises ValueError."""
    found = _SHARD_PATTERN.fullmatch(text)
    if not found or not int(found[1]) < int(found[2]):
        message = f"{text!r} is not I/N with I from 0 to N - 1"
        raise ValueError(message)
    return int(found[1]), int(found[2])


class FileLister:
    """Lists files of `source`, and checks in `sink` which of them have an output.

    State: `_name_counts`, where the first listing counts names, None once it has begun; `_unordered_logged`,
    that a server without ordered listings was logged.
    """

    def __init__(
        self,
        source: Storage,
        sink: Storage,
        *,
        shard: Shard,
        overwrite: bool,
        output_name: str | None = None,
        name_counts: NameCounts | None = None,
    ) -> None:
        # Only the first listing counts names: a later one would count them again.
        self._name_counts = name_counts
        self._source = source
        self._sink = sink
        self._shard = shard
        self._overwrite = overwrite
        self._output_name = output_name
        self._unordered_logged = False

    async def find_task(self, name: str) -> FileTask:
        """Return the task of one file. Raises StorageError."""
        return await self._with_output_state(await self._source.get_info(name), check_output=True)

    async def list_tasks(self, *, after: str = "") -> AsyncGenerator[FileTask]:
        """Yield the tasks of all files of INPUT whose name is greater than `after`. Raises StorageError."""
        async with aclosing(self._merge_listings(after)) as pairs:
            chunk: list[tuple[FileInfo, bool]] = []
            async for file, check_output in pairs:
                chunk.append((file, check_output))
                # No request is needed for this file, and none is pending, so it is yielded at once.
                if not (check_output or file.is_archived) and len(chunk) == 1:
                    yield await self._with_output_state(file, check_output=False)
                    chunk = []
                elif len(chunk) == _HEAD_CONCURRENCY:
                    for task in await self._with_output_states(chunk):
                        yield task
                    chunk = []
            for task in await self._with_output_states(chunk):
                yield task

    async def _with_output_states(self, chunk: list[tuple[FileInfo, bool]]) -> list[FileTask]:
        return await gather_or_cancel(
            self._with_output_state(file, check_output=check_output) for file, check_output in chunk
        )

    async def _merge_listings(self, after: str) -> AsyncGenerator[tuple[FileInfo, bool]]:
        """Yield each file of INPUT in this shard, and whether its output must be checked.

        That is the case if OUTPUT lists the same name. Unordered listings cannot be merged, so every output
        is checked then. With --overwrite every output is checked as well, since nearly all exist.
        """
        name_counts = self._name_counts
        self._name_counts = None
        outputs = _SortedNames(self._sink.list(after=after))
        async for file in self._source.list(after=after, name_counts=name_counts):
            if name_counts is not None:
                name_counts.files += 1
            if not self._shard.contains(file.name):
                continue
            check_output = self._overwrite or self._is_unordered() or await outputs.contains(file.name)
            yield file, check_output or self._is_unordered()

    def _is_unordered(self) -> bool:
        for storage in (self._source, self._sink):
            if storage.is_unordered:
                if not self._unordered_logged:
                    _log.warning(
                        "%s: the server lists objects without an order; each output is looked at by itself",
                        storage.uri(""),
                    )
                self._unordered_logged = True
                return True
        return False

    async def _with_output_state(self, file: FileInfo, *, check_output: bool) -> FileTask:
        """Return the task of a file after its output was checked.

        A listing shows the output's name, but not from which input it was made.
        """
        output_name = self._output_name or file.name
        lines_format = format_for_name(file.name)
        # A listing has only names of known formats.
        assert lines_format  # noqa: S101 - a listing takes no other names
        try:
            output = await self._sink.existing_output(output_name, file) if check_output else None
        except StorageError as error:
            # Only this file fails: the outputs of the others can still be checked.
            return FileTask(file, output_name, lines_format, error=error)
        is_done = bool(output and output.is_from_input and not self._overwrite)
        # A file that is done need not be read. It counts as not archived, so that --watch does not take a
        # restored object for a new one.
        if file.is_archived:
            file = replace(file, is_archived=False) if is_done else await self._with_restore_state(file)
        return FileTask(file, output_name, lines_format, output.version if output else ABSENT, is_done)

    async def _with_restore_state(self, file: FileInfo) -> FileInfo:
        """Return an archived file together with whether it is restored, which a listing does not show."""
        try:
            return await self._source.get_info(file.name)
        except StorageError:
            # Reading the file will fail as well, and then the reason is reported for this file.
            return replace(file, is_archived=False)


class _SortedNames:
    """Sorted names of one listing, read in step with another. State: `_next_name`, the first not passed."""

    def __init__(self, files: AsyncIterator[FileInfo]) -> None:
        self._files = files
        self._next_name: bytes | None = b""

    async def contains(self, name: str) -> bool:
        wanted = name.encode()
        while self._next_name is not None and self._next_name < wanted:
            file = await anext(self._files, None)
            self._next_name = file.name.encode() if file else None
        return self._next_name == wanted
