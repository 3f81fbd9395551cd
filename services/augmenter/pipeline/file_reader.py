"""A file's text in blocks of lines, decoded by its first bytes."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from services.augmenter.stats import Totals
from services.common.codec import MAX_ZSTD_WINDOW_BYTES, Format
from services.common.detection import DetectingDecoder
from services.common.line_reader import MAX_LINE_BYTES, Block, blocks
from services.common.storage.protocol import Item, Store
from services.common.units import format_size


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """What one file may cost of memory: several lines of the largest size, and a window of zstd."""

    max_line_bytes: int = MAX_LINE_BYTES
    max_zstd_window_bytes: int = MAX_ZSTD_WINDOW_BYTES

    @property
    def long_line_reason(self) -> str:
        """Why a line over the limit is rejected."""
        return f"longer than {format_size(self.max_line_bytes)} (--max-line-bytes)"


class FileReader:
    """Reads one file of `source`."""

    def __init__(
        self, source: Store, item: Item, lines_format: Format, totals: Totals, limits: ReadLimits
    ) -> None:
        self._source = source
        self._item = item
        self._totals = totals
        self._limits = limits
        self._decoder = DetectingDecoder(lines_format, max_zstd_window_bytes=limits.max_zstd_window_bytes)

    @property
    def hint(self) -> str | None:
        """What the file seems to be, if not lines of objects; known once it is read."""
        return self._decoder.hint

    async def blocks(self) -> AsyncGenerator[Block]:
        """Yield the text in blocks of whole lines, piece by piece. Raises FileError."""
        async with (
            aclosing(self._source.read(self._item)) as chunks,
            aclosing(self._decoded(chunks)) as decoded,
            aclosing(blocks(decoded, max_line_bytes=self._limits.max_line_bytes)) as all_blocks,
        ):
            async for block in all_blocks:
                yield block

    async def _decoded(self, chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        async for chunk in chunks:
            self._totals.bytes_read += len(chunk)
            for decoded in self._decoder.feed(chunk):
                yield decoded
        for decoded in self._decoder.finish():
            yield decoded
