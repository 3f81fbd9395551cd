"""Split a stream of bytes into blocks of whole lines, in bounded memory.

Several JSON objects on one line count as one line each.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from services.common import json_objects

CHUNK_BYTES = 2**20
CHUNK_LINES = 20_000
# A file in progress holds several lines of this size: read, parsed, spliced, being written.
MAX_LINE_BYTES = 4 * 2**20
# Together with the parsed lines it fits into the cache of one processor core.
_BLOCK_BYTES = 2**17


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Consecutive lines joined by line feeds, and their number."""

    text: bytes
    line_count: int

    def split_in_half(self) -> tuple["LineBlock", "LineBlock"]:
        """Return the block in two blocks of about the same size. It must have at least two lines."""
        cut = self.text.find(b"\n", len(self.text) // 2)
        if cut < 0:
            cut = self.text.rfind(b"\n")
        first = self.text[:cut]
        count = _line_count(first)
        return LineBlock(first, count), LineBlock(self.text[cut + 1 :], self.line_count - count)


@dataclass(frozen=True, slots=True)
class LongLinePart:
    """A part of a line over the size limit. The parts of a line follow one another."""

    text: bytes
    is_last: bool


LineChunk: TypeAlias = list[LineBlock] | LongLinePart


async def read_line_chunks(
    data: AsyncIterator[bytes], *, max_line_bytes: int | None = None
) -> AsyncGenerator[LineChunk]:
    """Yield the lines in chunks of blocks. Only a line feed ends a line; the last line may have none."""
    cutter = _LineSplitter(MAX_LINE_BYTES if max_line_bytes is None else max_line_bytes)
    async for chunk in data:
        for block in cutter.feed(chunk):
            yield block
            del block
    for block in cutter.finish():
        yield block


class _LineSplitter:
    """State: `_buffer`, what is not cut yet; `_long_line`, finds the end of a line over the limit.

    `_next_scan_bytes`: how much of a line without an end is there when it is next scanned for objects.
    """

    def __init__(self, max_line_bytes: int) -> None:
        self._max_line_bytes = max_line_bytes
        self._block_bytes = min(_BLOCK_BYTES, max_line_bytes)
        self._buffer = bytearray()
        self._long_line: json_objects.ObjectScanner | None = None
        self._next_scan_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[LineChunk]:
        """Yield what the next bytes complete. Of a large chunk no more than a window is added at a time."""
        if len(chunk) <= CHUNK_BYTES:
            yield from self._add(chunk)
            return
        for start in range(0, len(chunk), CHUNK_BYTES):
            yield from self._add(chunk[start : start + CHUNK_BYTES])

    def _add(self, data: bytes) -> Iterator[LineChunk]:
        searched = len(self._buffer) if len(self._buffer) >= CHUNK_BYTES else 0
        self._buffer += data
        if len(self._buffer) < CHUNK_BYTES:
            return
        if self._long_line is not None:
            yield from self._continue_long_line(self._long_line)
            if len(self._buffer) < CHUNK_BYTES:
                return
            searched = 0
        cut = self._buffer.rfind(b"\n", searched)
        if cut >= 0:
            self._next_scan_bytes = 0
            # The pieces alone, not the text too.
            all_blocks = list(self._split_by_line_count(bytes(memoryview(self._buffer)[:cut])))
            del self._buffer[: cut + 1]
            for block in all_blocks:
                yield block
                del block
        else:
            yield from self._split_unterminated_line()

    def _continue_long_line(self, scanner: json_objects.ObjectScanner) -> Iterator[LineChunk]:
        end = self._buffer.find(b"\n")
        part = self._buffer if end < 0 else self._buffer[:end]
        next_object = scanner.feed(part)
        if next_object >= 0:
            end = next_object
            part = part[:end]
        self._long_line = scanner if end < 0 else None
        yield LongLinePart(bytes(part), is_last=end >= 0)
        if end < 0:
            self._buffer.clear()
        else:
            del self._buffer[: end if next_object >= 0 else end + 1]

    def _split_unterminated_line(self) -> Iterator[LineChunk]:
        is_over = len(self._buffer) > self._max_line_bytes
        if is_over or len(self._buffer) >= self._next_scan_bytes:
            parts, rest = json_objects.split_leading(bytes(self._buffer))
            # Each scan begins at the front again: with twice as much each time, all of them cost two.
            self._next_scan_bytes = 2 * len(self._buffer)
            if parts:
                self._buffer = bytearray(rest)
                self._next_scan_bytes = 2 * len(rest)
                yield from self._split_by_line_count(b"\n".join(parts))
                is_over = len(self._buffer) > self._max_line_bytes
        if is_over:
            self._next_scan_bytes = 0
            yield from self._continue_long_line(json_objects.ObjectScanner(self._buffer))

    def finish(self) -> Iterator[LineChunk]:
        """Yield the last lines."""
        if self._long_line is not None:
            yield from self._continue_long_line(self._long_line)
            if self._long_line is not None:
                yield LongLinePart(b"", is_last=True)
                return
        if self._buffer:
            yield from list(self._split_by_line_count(bytes(self._buffer).removesuffix(b"\n")))

    def _split_by_line_count(self, text: bytes) -> Iterator[LineChunk]:
        """Yield blocks of a bounded number of lines: very short lines cost more than their bytes."""
        block: list[LineBlock] = []
        lines_left = CHUNK_LINES
        for piece in self._split_blocks(text):
            if isinstance(piece, LongLinePart) or (piece.line_count > lines_left and block):
                if block:
                    yield block
                block, lines_left = [], CHUNK_LINES
            if isinstance(piece, LongLinePart):
                yield piece
                continue
            block.append(piece)
            lines_left -= piece.line_count
        if block:
            yield block

    def _split_blocks(self, text: bytes) -> Iterator[LineBlock | LongLinePart]:
        """Yield the lines, so many that a piece is at most so long, but for a line that is longer itself."""
        start = 0
        while len(text) - start > self._block_bytes:
            cut = text.rfind(b"\n", start, start + self._block_bytes + 1)
            if cut < 0:
                cut = text.find(b"\n", start + self._block_bytes)
                line = text[start:] if cut < 0 else text[start:cut]
                yield from self._split_large_line(line)
                if cut < 0:
                    return
            else:
                yield from _to_blocks(text[start:cut])
            start = cut + 1
        yield from _to_blocks(text[start:] if start else text)

    def _split_large_line(self, line: bytes) -> Iterator[LineBlock | LongLinePart]:
        if len(line) <= self._max_line_bytes:
            yield LineBlock(line, 1)
            return
        for part in json_objects.split_objects(line):
            if len(part) <= self._max_line_bytes:
                yield LineBlock(part, 1)
            else:
                yield LongLinePart(part, is_last=True)


def _to_blocks(text: bytes) -> Iterator[LineBlock]:
    count = _line_count(text)
    if count <= CHUNK_LINES:
        yield LineBlock(text, count)
        return
    lines = text.split(b"\n")
    for start in range(0, count, CHUNK_LINES):
        some = lines[start : start + CHUNK_LINES]
        yield LineBlock(b"\n".join(some), len(some))


def _line_count(text: bytes) -> int:
    # This takes a quarter of the time of `count`, which goes byte by byte.
    return 1 + len(text) - len(text.replace(b"\n", b""))
