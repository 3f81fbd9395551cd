"""Reads the text of a file in blocks of lines, decompressed as its first bytes indicate."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from services.augmenter.stats import RunStats
from services.common.codec import MAX_ZSTD_WINDOW_BYTES, Format
from services.common.detection import DetectingDecoder
from services.common.line_reader import MAX_LINE_BYTES, LineChunk, read_line_chunks
from services.common.storage.protocol import FileInfo, Storage
from services.common.units import format_size


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Limits that bound the memory of one file: several lines of the maximum size, and a zstd window."""

    max_line_bytes: int = MAX_LINE_BYTES
    max_zstd_window_bytes: int = MAX_ZSTD_WINDOW_BYTES

    @property
    def long_line_reason(self) -> str:
        """Return why a line over the limit is rejected."""
        return f"longer than {format_size(self.max_line_bytes)} (--max-line-bytes)"


class FileReader:
    """Reads one file of `source`."""

    def __init__(
        self, source: Storage, file: FileInfo, lines_format: Format, stats: RunStats, limits: ReadLimits
    ) -> None:
        self._source = source
        self._file = file
        self._stats = stats
        self._limits = limits
        self._decoder = DetectingDecoder(lines_format, max_zstd_window_bytes=limits.max_zstd_window_bytes)

    @property
    def format_hint(self) -> str | None:
        """Return what the file seems to be, if not lines of JSON objects. Known once it is read."""
        return self._decoder.hint

    async def read_chunks(self) -> AsyncGenerator[LineChunk]:
        """Yield the text in chunks of whole lines. Raises FileError."""
        async with (
            aclosing(self._source.read(self._file)) as data,
            aclosing(self._decode(data)) as decoded,
            aclosing(read_line_chunks(decoded, max_line_bytes=self._limits.max_line_bytes)) as line_chunks,
        ):
            async for chunk in line_chunks:
                yield chunk

    async def _decode(self, compressed: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        async for data in compressed:
            self._stats.bytes_read += len(data)
            for decoded in self._decoder.feed(data):
                yield decoded
        for decoded in self._decoder.finish():
            yield decoded
