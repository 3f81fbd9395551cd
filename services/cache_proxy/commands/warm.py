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
from services.cache_proxy.cache.entry import DAY_ZERO_SECONDS
from services.cache_proxy.commands.inputs import FileSource, InputFile, is_s3_uri, open_sources
from services.cache_proxy.commands.session import CacheSession, open_session
from services.cache_proxy.config.cache_settings import CacheSettings, KeySettings
from services.cache_proxy.config.command_settings import OutputSettings, WarmSettings
from services.cache_proxy.domain import DAY_SECONDS
from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.redis_client.backend import run_replacing_wrong_type
from services.cache_proxy.redis_client.values import read_integer
from services.common import json_objects
from services.common.detection import DetectingDecoder
from services.common.errors import CommandError
from services.common.levels import MAX_LEVEL, MIN_LEVEL
from services.common.line_reader import LongLinePart, read_line_chunks
from services.common.posting_fields import DEFAULT_FIELDS

_MAX_PENDING_WRITES = 4  # windows that Redis writes while the next is read
_CHECKPOINT_TTL_SECONDS = 7 * DAY_SECONDS  # for so long an interrupted run can be resumed
_RETRY_TIMEOUT_SECONDS, _RETRY_INTERVAL_SECONDS = 60.0, 0.5  # with a Redis that restarts or fails over
_REFRESH_INTERVAL_SECONDS = 0.2
_MAX_LINES = 2**53
_EXIT_FAILED, _EXIT_SKIPPED = 1, 3


_Level = Annotated[int, msgspec.Meta(ge=MIN_LEVEL, le=MAX_LEVEL)]


@dataclass(slots=True)
class WarmStats:
    """What a run did; lines that hold no pair with a level are skipped."""

    files: int = 0
    lines: int = 0
    pairs: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)


async def run(
    uris: Sequence[str],
    settings: WarmSettings,
    output: OutputSettings,
    cache: CacheSettings,
    key: KeySettings,
) -> int:
    """Warm from every file; the exit code. Raises CommandError."""
    totals, started_at = WarmStats(), time.monotonic()
    async with (
        open_session(cache, key, allow_new=True) as opened,
        open_sources(uris, endpoint_url=settings.endpoint_url) as readers,
    ):
        found = [
            (readers[is_s3_uri(place)], source)
            for place in uris
            for source in await readers[is_s3_uri(place)].list_files(place)
        ]
        await namespace.register(opened.backend, opened.key_settings)
        shown = sys.stderr.isatty() if settings.progress is None else settings.progress
        async with _progress_bar(found, totals, shown=shown) as moved:
            for reader, source in found:
                warming = _FileWarmer(
                    opened, reader, source, settings=settings, stats=totals, bytes_read=moved
                )
                try:
                    await warming.run(again=settings.again)
                    totals.files += 1
                except CommandError as error:
                    said = str(error)
                    totals.failures.append(said if source.uri in said else f"{source.uri}: {said}")
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


class _FileWarmer:
    """One file's way into the cache.

    State: `_under_way`, windows that are being written, oldest first, each with the line that it ends at: the
    place to resume at is behind the last one of an unbroken row that is written.
    """

    def __init__(
        self,
        session: CacheSession,
        file_source: FileSource,
        file: InputFile,
        *,
        settings: WarmSettings,
        stats: WarmStats,
        bytes_read: list[int],
    ) -> None:
        self._session = session
        self._settings = settings
        self._reader = file_source
        self._source = file
        self._stats = stats
        self._bytes_read = bytes_read
        self._day = max(
            0, int(file.modified_at - DAY_ZERO_SECONDS) // DAY_SECONDS
        )  # no answer in it is younger
        self._pending_writes: deque[tuple[asyncio.Task[None], int]] = deque()
        self._checkpoints_key = namespace.cache_keys(session.key_settings).warm_checkpoints
        # With how keys are made: what was written under others is not there for these.
        name = f"{file.uri}\0{file.version}\0{namespace.key_schema(session.key_settings)}"
        fields = settings.fields
        if fields != DEFAULT_FIELDS:
            name += f"\0{fields}"
        self._read_pair = fields.pair_getter
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(
            fields.make_struct("Posting", _Level)
        ).decode
        self._checkpoint_field = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()

    async def run(self, *, again: bool) -> None:
        """Write what is not written yet."""
        servers, bookmarks = self._session.backend, self._checkpoints_key
        stored = (
            None
            if again
            else await run_replacing_wrong_type(servers, bookmarks, "HGET", bookmarks, self._checkpoint_field)
        )
        done = read_integer(stored, minimum=0, maximum=_MAX_LINES) or 0
        if await self._run_from(done) < done:  # no line of this file: somebody else's number
            await self._run_from(0)

    async def _run_from(self, done: int) -> int:
        """Write all lines but the first `done`. Return how many lines there are."""
        at = 0
        try:
            async with aclosing(
                read_line_chunks(self._read_text(), max_line_bytes=self._settings.max_line_bytes)
            ) as all_blocks:
                async for block in all_blocks:
                    if isinstance(block, LongLinePart):
                        at += block.is_last
                        if block.is_last and at > done:
                            self._stats.lines += 1
                            self._stats.skipped += 1
                        continue
                    lines = [line for piece in block for line in piece.text.split(b"\n")]
                    at += len(lines)
                    if at > done:
                        await self._write(lines[max(0, len(lines) - (at - done)) :], at)
            while self._pending_writes:
                await self._await_oldest_write()
        finally:
            for task, _ in self._pending_writes:
                task.cancel()
            await asyncio.gather(*(task for task, _ in self._pending_writes), return_exceptions=True)
        return at

    async def _read_text(self) -> AsyncIterator[bytes]:
        decoder = DetectingDecoder(
            self._source.format, max_zstd_window_bytes=self._settings.max_zstd_window_bytes
        )
        async for data in self._reader.read(self._source):
            self._bytes_read[0] += len(data)
            for text in decoder.feed(data):
                yield text
        for text in decoder.finish():
            yield text

    async def _write(self, lines: list[bytes], at: int) -> None:
        levels = self._parse_levels(lines)
        self._stats.pairs += len(levels)
        put = _retry_while_unreachable(lambda: self._session.store.put(levels, day=self._day))
        self._pending_writes.append((asyncio.create_task(put), at))
        await asyncio.sleep(0)  # let it begin
        if len(self._pending_writes) >= _MAX_PENDING_WRITES:
            await self._await_oldest_write()

    async def _await_oldest_write(self) -> None:
        task, at = self._pending_writes[0]
        await task
        self._pending_writes.popleft()
        servers, bookmarks = self._session.backend, self._checkpoints_key
        await _retry_while_unreachable(
            lambda: servers.execute(bookmarks, "HSET", bookmarks, self._checkpoint_field, at)
        )
        await _retry_while_unreachable(
            lambda: servers.execute(bookmarks, "EXPIRE", bookmarks, _CHECKPOINT_TTL_SECONDS)
        )

    def _parse_levels(self, lines: list[bytes]) -> dict[bytes, int]:
        self._stats.lines += len(lines)
        try:
            postings = [self._decode(line) for line in lines]
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            parts = [part for line in lines for part in json_objects.split_objects(line)]
            self._stats.lines += len(parts) - len(lines)
            postings = [posting for part in parts if (posting := self._parse_posting(part)) is not None]
        pairs = {self._read_pair(posting): posting.level for posting in postings}
        digest = self._session.digest
        return {digest(company, title): level for (company, title), level in pairs.items()}

    def _parse_posting(self, line: bytes) -> Any:
        text = line.removeprefix(json_objects.BOM)
        try:
            return self._decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._stats.skipped += bool(text.strip())
            return None


async def _retry_while_unreachable(operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Until it is done: again while Redis cannot be reached, which does no harm. Raises `StoreError`."""
    give_up_at = time.monotonic() + _RETRY_TIMEOUT_SECONDS
    while True:
        try:
            return await operation()
        except StoreRejectedError:
            raise
        except StoreError:
            if time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(_RETRY_INTERVAL_SECONDS)


@asynccontextmanager
async def _progress_bar(
    files: Sequence[tuple[FileSource, InputFile]], stats: WarmStats, *, shown: bool
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
    whole = sum(source.size_bytes for _, source in files)
    with Progress(*columns, console=Console(stderr=True, force_terminal=True)) as progress:
        bar = progress.add_task("", total=whole or None, said="")

        def update() -> None:
            elapsed = progress.tasks[0].elapsed or 1.0
            said = f"{stats.files:,}/{len(files):,} files {stats.lines / elapsed:,.0f} lines/s"
            progress.update(bar, completed=moved[0], said=said)

        async def refresh() -> None:
            while True:
                update()
                await asyncio.sleep(_REFRESH_INTERVAL_SECONDS)

        task = asyncio.create_task(refresh())
        try:
            yield moved
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            update()
