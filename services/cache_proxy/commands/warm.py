"""`cache-proxy warm`: postings that have a level already, into the cache, without a call to the model."""

import asyncio
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.entry import DAY_0, DAY_SECONDS
from services.cache_proxy.commands.inputs import Place, Source, is_in_bucket, open_places
from services.cache_proxy.commands.session import Cache, open_cache
from services.cache_proxy.config.command_settings import OutputSettings, WarmSettings
from services.cache_proxy.config.settings import CacheSettings, KeySettings
from services.cache_proxy.errors import StoreError, StoreRefused
from services.cache_proxy.redis_client.backend import heal
from services.cache_proxy.redis_client.values import read_integer
from services.common import json_objects
from services.common.detection import DetectingDecoder
from services.common.errors import CommandError
from services.common.line_reader import LongLinePart, blocks
from services.common.posting_fields import DEFAULT

_UNDER_WAY = 4  # windows that Redis writes while the next is read
_KEPT_SECONDS = 7 * DAY_SECONDS  # for so long an interrupted run can be resumed
_PATIENCE_SECONDS, _RETRY_SECONDS = 60.0, 0.5  # with a Redis that restarts or fails over
_REFRESH_SECONDS = 0.2
_MAX_LINES = 2**53
_EXIT_FAILED, _EXIT_SKIPPED = 1, 3


_LEVEL = Annotated[int, msgspec.Meta(ge=1, le=7)]


@dataclass(slots=True)
class Totals:
    """What a run did; lines that hold no pair with a level are skipped."""

    files: int = 0
    lines: int = 0
    pairs: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)


async def run(
    places: Sequence[str],
    settings: WarmSettings,
    output: OutputSettings,
    cache: CacheSettings,
    key: KeySettings,
) -> int:
    """Warm from every file; the exit code. Raises CommandError."""
    totals, started_at = Totals(), time.monotonic()
    async with (
        open_cache(cache, key, may_be_new=True) as opened,
        open_places(places, endpoint_url=settings.endpoint_url) as readers,
    ):
        found = [
            (readers[is_in_bucket(place)], source)
            for place in places
            for source in await readers[is_in_bucket(place)].find(place)
        ]
        await namespace.note(opened.servers, opened.key)
        shown = sys.stderr.isatty() if settings.progress is None else settings.progress
        async with _progress(found, totals, shown=shown) as moved:
            for reader, source in found:
                warming = _Warming(opened, reader, source, settings=settings, totals=totals, moved=moved)
                try:
                    await warming.run(again=settings.again)
                    totals.files += 1
                except CommandError as error:
                    said = str(error)
                    totals.failures.append(said if source.place in said else f"{source.place}: {said}")
    seconds = time.monotonic() - started_at
    for failure in totals.failures:
        sys.stderr.write(f"cache-proxy warm: {' '.join(failure.split())}\n")
    if output.json:
        sys.stdout.write(json.dumps({**asdict(totals), "seconds": round(seconds, 3)}) + "\n")
    else:
        sys.stdout.write(
            f"{totals.pairs:,} pairs of {totals.lines:,} lines in {totals.files:,} files, "
            f"{totals.skipped:,} lines skipped; {seconds:.1f} s, {totals.lines / seconds:,.0f} lines/s\n"
        )
    return _EXIT_FAILED if totals.failures else _EXIT_SKIPPED if totals.skipped else 0


class _Warming:
    """One file's way into the cache.

    State: `_under_way`, windows that are being written, oldest first, each with the line that it ends at: the
    place to resume at is behind the last one of an unbroken row that is written.
    """

    def __init__(
        self,
        cache: Cache,
        reader: Place,
        source: Source,
        *,
        settings: WarmSettings,
        totals: Totals,
        moved: list[int],
    ) -> None:
        self._cache = cache
        self._settings = settings
        self._reader = reader
        self._source = source
        self._totals = totals
        self._moved = moved
        self._day = max(0, int(source.modified_at - DAY_0) // DAY_SECONDS)  # no answer in it is younger
        self._under_way: deque[tuple[asyncio.Task[None], int]] = deque()
        self._bookmarks = namespace.bookmarks_key(cache.key)
        # With how keys are made: what was written under others is not there for these.
        name = f"{source.place}\0{source.version}\0{namespace.recipe(cache.key)}"
        fields = settings.fields
        if fields != DEFAULT:
            name += f"\0{fields}"
        self._pair_of = fields.getter
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(fields.struct("Posting", _LEVEL)).decode
        self._file = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()

    async def run(self, *, again: bool) -> None:
        """Write what is not written yet."""
        servers, bookmarks = self._cache.servers, self._bookmarks
        stored = None if again else await heal(servers, bookmarks, "HGET", bookmarks, self._file)
        done = read_integer(stored, minimum=0, maximum=_MAX_LINES) or 0
        if await self._run_from(done) < done:  # no line of this file: somebody else's number
            await self._run_from(0)

    async def _run_from(self, done: int) -> int:
        """Write all lines but the first `done`. Return how many lines there are."""
        at = 0
        try:
            async with aclosing(
                blocks(self._text(), max_line_bytes=self._settings.max_line_bytes)
            ) as all_blocks:
                async for block in all_blocks:
                    if isinstance(block, LongLinePart):
                        at += block.is_last
                        if block.is_last and at > done:
                            self._totals.lines += 1
                            self._totals.skipped += 1
                        continue
                    lines = [line for piece in block for line in piece.text.split(b"\n")]
                    at += len(lines)
                    if at > done:
                        await self._write(lines[max(0, len(lines) - (at - done)) :], at)
            while self._under_way:
                await self._written()
        finally:
            for task, _ in self._under_way:
                task.cancel()
            await asyncio.gather(*(task for task, _ in self._under_way), return_exceptions=True)
        return at

    async def _text(self) -> AsyncIterator[bytes]:
        decoder = DetectingDecoder(
            self._source.format, max_zstd_window_bytes=self._settings.max_zstd_window_bytes
        )
        async for data in self._reader.read(self._source):
            self._moved[0] += len(data)
            for text in decoder.feed(data):
                yield text
        for text in decoder.finish():
            yield text

    async def _write(self, lines: list[bytes], at: int) -> None:
        levels = self._levels(lines)
        self._totals.pairs += len(levels)
        put = _patiently(lambda: self._cache.store.put(levels, day=self._day))
        self._under_way.append((asyncio.create_task(put), at))
        await asyncio.sleep(0)  # let it begin
        if len(self._under_way) >= _UNDER_WAY:
            await self._written()

    async def _written(self) -> None:
        task, at = self._under_way[0]
        await task
        self._under_way.popleft()
        servers, bookmarks = self._cache.servers, self._bookmarks
        await _patiently(lambda: servers.command(bookmarks, "HSET", bookmarks, self._file, at))
        await _patiently(lambda: servers.command(bookmarks, "EXPIRE", bookmarks, _KEPT_SECONDS))

    def _levels(self, lines: list[bytes]) -> dict[bytes, int]:
        self._totals.lines += len(lines)
        try:
            postings = [self._decode(line) for line in lines]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            parts = [part for line in lines for part in json_objects.split(line)]
            self._totals.lines += len(parts) - len(lines)
            postings = [posting for part in parts if (posting := self._posting(part)) is not None]
        pairs = {self._pair_of(posting): posting.level for posting in postings}
        digest = self._cache.digest
        return {digest(company, title): level for (company, title), level in pairs.items()}

    def _posting(self, line: bytes) -> Any:
        text = line.removeprefix(json_objects.BOM)
        try:
            return self._decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._totals.skipped += bool(text.strip())
            return None


async def _patiently(act: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Until it is done: again while Redis cannot be reached, which does no harm. Raises `StoreError`."""
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return await act()
        except StoreRefused:
            raise
        except StoreError:
            if time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(_RETRY_SECONDS)


@asynccontextmanager
async def _progress(
    found: Sequence[tuple[Place, Source]], totals: Totals, *, shown: bool
) -> AsyncIterator[list[int]]:
    """Show the run moving, by the bytes that were read: the one number in the list."""
    moved = [0]
    if not shown:
        yield moved
        return
    columns = (
        TextColumn("{task.fields[said]}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    whole = sum(source.size_bytes for _, source in found)
    with Progress(*columns, console=Console(stderr=True, force_terminal=True)) as progress:
        bar = progress.add_task("", total=whole or None, said="")

        def update() -> None:
            elapsed = progress.tasks[0].elapsed or 1.0
            said = f"{totals.files:,}/{len(found):,} files {totals.lines / elapsed:,.0f} lines/s"
            progress.update(bar, completed=moved[0], said=said)

        async def refresh() -> None:
            while True:
                update()
                await asyncio.sleep(_REFRESH_SECONDS)

        task = asyncio.create_task(refresh())
        try:
            yield moved
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            update()
