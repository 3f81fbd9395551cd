"""The files to do: INPUT's listing beside OUTPUT's, both in one order and page by page."""

import logging
import re
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.common.codec import Format, format_for_name
from services.common.storage.errors import StorageError
from services.common.storage.input_listing import NameCounts
from services.common.storage.protocol import ABSENT, FileInfo, Storage
from services.common.tasks import gather_or_cancel

_HEAD_CONCURRENCY = 32
_SHARD_PATTERN = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)
_log = logging.getLogger("augmenter")


@dataclass(frozen=True, slots=True)
class Shard:
    """A process's part of the files, by name: the same in every run, and nobody has to agree on it."""

    index: int = 0
    count: int = 1

    def contains(self, name: str) -> bool:
        """Whether a file is this process's."""
        return zlib.crc32(name.encode()) % self.count == self.index


def parse_shard(text: str) -> tuple[int, int]:
    """Read `I/N`. Raises ValueError."""
    found = _SHARD_PATTERN.fullmatch(text)
    if not found or not int(found[1]) < int(found[2]):
        message = f"{text!r} is not I/N with I from 0 to N - 1"
        raise ValueError(message)
    return int(found[1]), int(found[2])


@dataclass(frozen=True, slots=True)
class FileTask:
    """One file, where its output goes, and which version of it (or NOTHING) is to be replaced.

    `is_done`: its output is there already. `failure`: its output cannot be looked at.
    """

    file: FileInfo
    output_name: str
    lines_format: Format
    expected_version: str = ABSENT
    is_done: bool = False
    error: StorageError | None = None


class FileLister:
    """Finds files in `source`, and looks in `sink` for what is there of them.

    State: `_listing`, where the first listing counts names, None once it has begun. `_noted_disorder`, that a
    server without an order was logged.
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
        self._name_counts = name_counts  # a later one would count names again
        self._source = source
        self._sink = sink
        self._shard = shard
        self._overwrite = overwrite
        self._output_name = output_name
        self._unordered_logged = False

    async def find_task(self, name: str) -> FileTask:
        """One file. Raises StoreError."""
        return await self._with_output_state(await self._source.get_info(name), check_output=True)

    async def list_tasks(self, *, after: str = "") -> AsyncGenerator[FileTask]:
        """Every file of INPUT behind a name. Raises StoreError."""
        async with aclosing(self._merge_listings(after)) as pairs:
            some: list[tuple[FileInfo, bool]] = []
            async for item, listed in pairs:
                some.append((item, listed))
                if not (listed or item.is_archived) and len(some) == 1:  # nothing to wait for
                    yield await self._with_output_state(item, check_output=False)
                    some = []
                elif len(some) == _HEAD_CONCURRENCY:
                    for job in await self._with_output_states(some):
                        yield job
                    some = []
            for job in await self._with_output_states(some):
                yield job

    async def _with_output_states(self, chunk: list[tuple[FileInfo, bool]]) -> list[FileTask]:
        return await gather_or_cancel(
            self._with_output_state(item, check_output=listed) for item, listed in chunk
        )

    async def _merge_listings(self, after: str) -> AsyncGenerator[tuple[FileInfo, bool]]:
        """Each of this shard's files of INPUT, and whether it has to be looked at in OUTPUT.

        It has if OUTPUT lists one of its name. Where a listing has no order, the two cannot be compared: then
        each is looked at, and so it is with --overwrite, where nearly all are there.
        """
        listing, self._name_counts = self._name_counts, None
        outputs = _SortedNames(self._sink.list(after=after))
        async for item in self._source.list(after=after, listing=listing):
            if listing is not None:
                listing.files += 1
            if not self._shard.contains(item.name):
                continue
            listed = self._overwrite or self._is_unordered() or await outputs.contains(item.name)
            yield item, listed or self._is_unordered()

    def _is_unordered(self) -> bool:
        for store in (self._source, self._sink):
            if store.is_unordered:
                if not self._unordered_logged:
                    _log.warning(
                        "%s: the server lists objects without an order; each output is looked at by itself",
                        store.uri(""),
                    )
                self._unordered_logged = True
                return True
        return False

    async def _with_output_state(self, file: FileInfo, *, check_output: bool) -> FileTask:
        """The job, once its output has been looked at: a listing tells its name, not what it was made of."""
        output_name = self._output_name or file.name
        lines_format = format_for_name(file.name)
        assert lines_format  # noqa: S101 - a listing takes no other names
        try:
            made = await self._sink.existing_output(output_name, file) if check_output else None
        except StorageError as error:  # the other files' outputs may be seen all the same
            return FileTask(file, output_name, lines_format, error=error)
        is_done = bool(made and made.is_from_input and not self._overwrite)
        if file.is_archived:  # what is done need not be read, so --watch takes a restored object for the same
            file = replace(file, is_archived=False) if is_done else await self._with_restore_state(file)
        return FileTask(file, output_name, lines_format, made.version if made else ABSENT, is_done)

    async def _with_restore_state(self, file: FileInfo) -> FileInfo:
        """Return an archived object with what a listing does not know: whether it is restored."""
        try:
            return await self._source.get_info(file.name)
        except StorageError:  # reading it will fail, too, and names the reason as this file's own
            return replace(file, is_archived=False)


class _SortedNames:
    """A listing that is asked for names in its own order. State: `_next`, the first not yet passed."""

    def __init__(self, files: AsyncIterator[FileInfo]) -> None:
        self._files = files
        self._next_name: bytes | None = b""

    async def contains(self, name: str) -> bool:
        wanted = name.encode()
        while self._next_name is not None and self._next_name < wanted:
            item = await anext(self._files, None)
            self._next_name = item.name.encode() if item else None
        return self._next_name == wanted
