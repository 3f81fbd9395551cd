"""The files to do: INPUT's listing beside OUTPUT's, both in one order and page by page."""

import logging
import re
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from services.augmenter.tasks import together
from services.common.codec import Format, format_of
from services.common.storage.errors import StoreError
from services.common.storage.input_listing import InputListing
from services.common.storage.protocol import NOTHING, Item, Store

_LOOKED_AT_TOGETHER = 32
_SHARD = re.compile(r"(\d{1,6})/(\d{1,6})", re.ASCII)
_log = logging.getLogger("augmenter")


@dataclass(frozen=True, slots=True)
class Shard:
    """A process's part of the files, by name: the same in every run, and nobody has to agree on it."""

    index: int = 0
    count: int = 1

    def has(self, name: str) -> bool:
        """Whether a file is this process's."""
        return zlib.crc32(name.encode()) % self.count == self.index


def parse_shard(text: str) -> tuple[int, int]:
    """Read `I/N`. Raises ValueError."""
    found = _SHARD.fullmatch(text)
    if not found or not int(found[1]) < int(found[2]):
        message = f"{text!r} is not I/N with I from 0 to N - 1"
        raise ValueError(message)
    return int(found[1]), int(found[2])


@dataclass(frozen=True, slots=True)
class Job:
    """One file, where its output goes, and which version of it (or NOTHING) is to be replaced.

    `is_done`: its output is there already. `failure`: its output cannot be looked at.
    """

    item: Item
    output_name: str
    lines_format: Format
    onto: str = NOTHING
    is_done: bool = False
    failure: StoreError | None = None


class Jobs:
    """Finds files in `source`, and looks in `sink` for what is there of them.

    State: `_listing`, where the first listing counts names, None once it has begun. `_noted_disorder`, that a
    server without an order was logged.
    """

    def __init__(
        self,
        source: Store,
        sink: Store,
        *,
        shard: Shard,
        overwrite: bool,
        output_name: str | None = None,
        listing: InputListing | None = None,
    ) -> None:
        self._listing = listing  # a later one would count names again
        self._source = source
        self._sink = sink
        self._shard = shard
        self._overwrite = overwrite
        self._output_name = output_name
        self._noted_disorder = False

    async def named(self, name: str) -> Job:
        """One file. Raises StoreError."""
        return await self._seen(await self._source.find(name), listed=True)

    async def all(self, *, after: str = "") -> AsyncGenerator[Job]:
        """Every file of INPUT behind a name. Raises StoreError."""
        async with aclosing(self._merged(after)) as pairs:
            some: list[tuple[Item, bool]] = []
            async for item, listed in pairs:
                some.append((item, listed))
                if not (listed or item.is_archived) and len(some) == 1:  # nothing to wait for
                    yield await self._seen(item, listed=False)
                    some = []
                elif len(some) == _LOOKED_AT_TOGETHER:
                    for job in await self._all_seen(some):
                        yield job
                    some = []
            for job in await self._all_seen(some):
                yield job

    async def _all_seen(self, some: list[tuple[Item, bool]]) -> list[Job]:
        return await together(self._seen(item, listed=listed) for item, listed in some)

    async def _merged(self, after: str) -> AsyncGenerator[tuple[Item, bool]]:
        """Each of this shard's files of INPUT, and whether it has to be looked at in OUTPUT.

        It has if OUTPUT lists one of its name. Where a listing has no order, the two cannot be compared: then
        each is looked at, and so it is with --overwrite, where nearly all are there.
        """
        listing, self._listing = self._listing, None
        outputs = _Names(self._sink.list(after=after))
        async for item in self._source.list(after=after, listing=listing):
            if listing is not None:
                listing.files += 1
            if not self._shard.has(item.name):
                continue
            listed = self._overwrite or self._is_unordered() or await outputs.has(item.name)
            yield item, listed or self._is_unordered()

    def _is_unordered(self) -> bool:
        for store in (self._source, self._sink):
            if store.is_unordered:
                if not self._noted_disorder:
                    _log.warning(
                        "%s: the server lists objects without an order; each output is looked at by itself",
                        store.place(""),
                    )
                self._noted_disorder = True
                return True
        return False

    async def _seen(self, item: Item, *, listed: bool) -> Job:
        """The job, once its output has been looked at: a listing tells its name, not what it was made of."""
        output_name = self._output_name or item.name
        lines_format = format_of(item.name)
        assert lines_format  # noqa: S101 - a listing takes no other names
        try:
            made = await self._sink.made(output_name, item) if listed else None
        except StoreError as error:  # the other files' outputs may be seen all the same
            return Job(item, output_name, lines_format, failure=error)
        is_done = bool(made and made.from_this_input and not self._overwrite)
        if item.is_archived:  # what is done need not be read, so --watch takes a restored object for the same
            item = replace(item, is_archived=False) if is_done else await self._looked_at(item)
        return Job(item, output_name, lines_format, made.version if made else NOTHING, is_done)

    async def _looked_at(self, item: Item) -> Item:
        """Return an archived object with what a listing does not know: whether it is restored."""
        try:
            return await self._source.find(item.name)
        except StoreError:  # reading it will fail, too, and names the reason as this file's own
            return replace(item, is_archived=False)


class _Names:
    """A listing that is asked for names in its own order. State: `_next`, the first not yet passed."""

    def __init__(self, items: AsyncIterator[Item]) -> None:
        self._items = items
        self._next: bytes | None = b""

    async def has(self, name: str) -> bool:
        wanted = name.encode()
        while self._next is not None and self._next < wanted:
            item = await anext(self._items, None)
            self._next = item.name.encode() if item else None
        return self._next == wanted
