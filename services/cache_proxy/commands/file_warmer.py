"""Put the pairs of one file of augmented postings into the cache, from the last checkpoint on."""

import asyncio
import hashlib
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.entry import DAY_ZERO_SECONDS
from services.cache_proxy.commands.session import CacheSession
from services.cache_proxy.config.command_settings import WarmSettings
from services.cache_proxy.domain import DAY_SECONDS
from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.redis_client.backend import run_replacing_wrong_type
from services.cache_proxy.redis_client.values import read_integer
from services.common import json_objects
from services.common.detection import DetectingDecoder
from services.common.levels import MAX_LEVEL, MIN_LEVEL
from services.common.line_reader import LineChunk, LongLinePart, read_line_chunks
from services.common.posting_fields import DEFAULT_FIELDS
from services.common.storage.inputs import InputFile

# Chunks of lines that are being written to Redis while the next one is read.
_MAX_PENDING_WRITES = 4
# An interrupted run can be resumed for this long.
_CHECKPOINT_TTL_SECONDS = 7 * DAY_SECONDS
# Time for Redis to restart or to fail over.
_RETRY_TIMEOUT_SECONDS = 60.0
_RETRY_INTERVAL_SECONDS = 0.5
_MAX_LINES = 2**53
_NANOSECONDS = 10**9

_Level = Annotated[int, msgspec.Meta(ge=MIN_LEVEL, le=MAX_LEVEL)]


@dataclass(slots=True)
class WarmStats:
    """What a run did. Lines without a pair and a level are `skipped`."""

    files: int = 0
    lines: int = 0
    pairs: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(slots=True)
class BytesRead:
    """The number of bytes that were read of all files, for the progress bar."""

    count: int = 0


class FileWarmer:
    """Reads one file and writes its pairs to the cache.

    State: `_pending_writes`, the chunks that are being written, oldest first, each with the number of its
    last line. A checkpoint in Redis holds the number of lines up to which all are written.
    """

    def __init__(
        self,
        session: CacheSession,
        file: InputFile,
        *,
        settings: WarmSettings,
        stats: WarmStats,
        bytes_read: BytesRead,
    ) -> None:
        self._file = file
        self._bytes_read = bytes_read
        self._session = session
        self._settings = settings
        self._stats = stats
        # No answer in the file is younger than the file.
        age_day = (file.info.modified_ns // _NANOSECONDS - DAY_ZERO_SECONDS) // DAY_SECONDS
        self._day = max(0, age_day)
        self._pending_writes: deque[tuple[asyncio.Task[None], int]] = deque()
        self._checkpoints_key = namespace.cache_keys(session.key_settings).warm_checkpoints
        fields = settings.fields
        self._read_pair = fields.pair_getter
        posting_type = fields.make_struct("Posting", _Level)
        self._decode: Callable[[bytes], Any] = msgspec.json.Decoder(posting_type).decode
        # The checkpoint belongs to the schema of the keys as well: pairs that were written under other keys
        # are not found under these.
        name = f"{file.uri}\0{file.info.version}\0{namespace.key_schema(session.key_settings)}"
        if fields != DEFAULT_FIELDS:
            name += f"\0{fields}"
        self._checkpoint_field = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()

    async def run(self, *, again: bool) -> None:
        """Write the lines behind the checkpoint; with `again`, all lines."""
        done = 0 if again else await self._read_checkpoint()
        # A checkpoint behind the last line is not of this file.
        if await self._write_from(done) < done:
            await self._write_from(0)

    async def _read_checkpoint(self) -> int:
        key = self._checkpoints_key
        stored = await run_replacing_wrong_type(
            self._session.backend, key, "HGET", key, self._checkpoint_field
        )
        return read_integer(stored, minimum=0, maximum=_MAX_LINES) or 0

    async def _write_from(self, done: int) -> int:
        """Write all lines but the first `done`. Return the number of lines in the file."""
        line_number = 0
        chunks = read_line_chunks(self._read_text(), max_line_bytes=self._settings.max_line_bytes)
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    line_number = await self._write_chunk(chunk, line_number, done)
            while self._pending_writes:
                await self._await_oldest_write()
        finally:
            for task, _ in self._pending_writes:
                task.cancel()
            await asyncio.gather(*(task for task, _ in self._pending_writes), return_exceptions=True)
        return line_number

    async def _write_chunk(self, chunk: LineChunk, line_number: int, done: int) -> int:
        """Write the lines of a chunk that come behind line `done`. Return the number of its last line."""
        if isinstance(chunk, LongLinePart):
            line_number += chunk.is_last
            if chunk.is_last and line_number > done:
                self._stats.lines += 1
                self._stats.skipped += 1
            return line_number
        lines = [line for block in chunk for line in block.text.split(b"\n")]
        line_number += len(lines)
        if line_number > done:
            await self._start_write(lines[max(0, len(lines) - (line_number - done)) :], line_number)
        return line_number

    async def _read_text(self) -> AsyncIterator[bytes]:
        decoder = DetectingDecoder(
            self._file.format, max_zstd_window_bytes=self._settings.max_zstd_window_bytes
        )
        async with aclosing(self._file.storage.read(self._file.info)) as content:
            async for data in content:
                self._bytes_read.count += len(data)
                for text in decoder.feed(data):
                    yield text
        for text in decoder.finish():
            yield text

    async def _start_write(self, lines: list[bytes], line_number: int) -> None:
        levels = self._parse_levels(lines)
        self._stats.pairs += len(levels)
        put = _retry_while_unreachable(lambda: self._session.store.put(levels, day=self._day))
        self._pending_writes.append((asyncio.create_task(put), line_number))
        # Let the task send its first command before the next chunk is read.
        await asyncio.sleep(0)
        if len(self._pending_writes) >= _MAX_PENDING_WRITES:
            await self._await_oldest_write()

    async def _await_oldest_write(self) -> None:
        """Wait for the oldest write, then move the checkpoint behind it."""
        task, line_number = self._pending_writes[0]
        await task
        self._pending_writes.popleft()
        backend, key = self._session.backend, self._checkpoints_key
        await _retry_while_unreachable(
            lambda: backend.execute(key, "HSET", key, self._checkpoint_field, line_number)
        )
        await _retry_while_unreachable(lambda: backend.execute(key, "EXPIRE", key, _CHECKPOINT_TTL_SECONDS))

    def _parse_levels(self, lines: list[bytes]) -> dict[bytes, int]:
        """Return the level of each pair in the lines, by the digest of the pair."""
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
    """Repeat an idempotent operation while Redis cannot be reached. Raises StoreError after a minute."""
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
