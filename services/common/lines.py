"""A stream of bytes cut into blocks of whole lines, in bounded memory."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass

from services.common.errors import LineTooLongError

WINDOW_BYTES = 2**20
WINDOW_LINES = 20_000
MAX_LINE_BYTES = 4 * 2**20  # a file in work has several in hand: read, parsed, spliced, on its way
BOM = b"\xef\xbb\xbf"
_PIECE_BYTES = 2**17  # with what is parsed of it, what a processor's core has as cache of its own


@dataclass(frozen=True, slots=True)
class Piece:
    """Lines joined by their line feeds, and how many they are."""

    text: bytes
    count: int

    def halves(self) -> tuple["Piece", "Piece"]:
        """The same in two, if they are two lines at least; of about one size."""
        cut = self.text.find(b"\n", len(self.text) // 2)
        if cut < 0:
            cut = self.text.rfind(b"\n")
        first = self.text[:cut]
        count = _line_count(first)
        return Piece(first, count), Piece(self.text[cut + 1 :], self.count - count)


async def windows(chunks: AsyncIterator[bytes]) -> AsyncGenerator[list[bytes]]:
    """Lists of lines without their line feed, which alone ends a line; a last line may lack it."""
    async with aclosing(blocks(chunks)) as all_blocks:
        async for block in all_blocks:
            yield [line for piece in block for line in piece.text.split(b"\n")]


async def blocks(chunks: AsyncIterator[bytes]) -> AsyncGenerator[list[Piece]]:
    """The same lines in pieces, so many at a time."""
    buffer = bytearray()
    lines_before = 0
    async for chunk in chunks:
        searched = len(buffer) if len(buffer) >= WINDOW_BYTES else 0
        buffer += chunk
        if len(buffer) < WINDOW_BYTES:
            continue
        _check_first_line(buffer, lines_before)
        cut = buffer.rfind(b"\n", searched)
        if cut >= 0:
            all_blocks = list(_bounded(bytes(memoryview(buffer)[:cut])))  # the pieces alone, not the text too
            del buffer[: cut + 1]
            for block in all_blocks:
                lines_before += sum(piece.count for piece in block)
                yield block
                del block
    _check_first_line(buffer, lines_before)
    if buffer:
        for block in list(_bounded(bytes(buffer).removesuffix(b"\n"))):
            yield block


def _check_first_line(buffer: bytearray, lines_before: int) -> None:
    """Only the first can be too long: the buffer is emptied of whole lines as soon as it is a window."""
    if len(buffer) > MAX_LINE_BYTES and not 0 <= buffer.find(b"\n") <= MAX_LINE_BYTES:
        raise LineTooLongError(line=lines_before + 1, limit_bytes=MAX_LINE_BYTES)


def _bounded(text: bytes) -> Iterator[list[Piece]]:
    """The text in blocks of a bounded number of lines: very short lines cost more than their bytes."""
    block: list[Piece] = []
    room = WINDOW_LINES
    for piece in _pieces(text):
        if piece.count > room and block:
            yield block
            block, room = [], WINDOW_LINES
        block.append(piece)
        room -= piece.count
    yield block


def _pieces(text: bytes) -> Iterator[Piece]:
    start = 0
    while len(text) - start > _PIECE_BYTES:
        cut = text.rfind(b"\n", start, start + _PIECE_BYTES)
        if cut < 0:
            cut = text.find(b"\n", start + _PIECE_BYTES)
            if cut < 0:
                break
        yield from _counted(text[start:cut])
        start = cut + 1
    yield from _counted(text[start:] if start else text)


def _counted(text: bytes) -> Iterator[Piece]:
    count = _line_count(text)
    if count <= WINDOW_LINES:
        yield Piece(text, count)
        return
    lines = text.split(b"\n")
    for start in range(0, count, WINDOW_LINES):
        some = lines[start : start + WINDOW_LINES]
        yield Piece(b"\n".join(some), len(some))


def _line_count(text: bytes) -> int:
    return 1 + len(text) - len(text.replace(b"\n", b""))  # a quarter of what `count` takes, byte by byte
