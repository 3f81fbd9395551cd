"""A stream of bytes cut into blocks of whole lines, in bounded memory."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing

from services.common.errors import LineTooLongError

WINDOW_BYTES = 2**20
WINDOW_LINES = 20_000
MAX_LINE_BYTES = 4 * 2**20  # a file in work has several in hand: read, parsed, spliced, on its way
BOM = b"\xef\xbb\xbf"


async def windows(chunks: AsyncIterator[bytes]) -> AsyncGenerator[list[bytes]]:
    """Lists of lines without their line feed, which alone ends a line; a last line may lack it."""
    async with aclosing(blocks(chunks)) as all_blocks:
        async for block, _ in all_blocks:
            yield block.split(b"\n")


async def blocks(chunks: AsyncIterator[bytes]) -> AsyncGenerator[tuple[bytes, int]]:
    """The same lines, still joined by their line feeds, and how many they are."""
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
            bounded = _bounded(bytes(memoryview(buffer)[:cut]))
            del buffer[: cut + 1]
            for block, count in bounded:
                lines_before += count
                yield block, count
                del block
    _check_first_line(buffer, lines_before)
    if buffer:
        for counted in _bounded(bytes(buffer).removesuffix(b"\n")):
            yield counted


def _check_first_line(buffer: bytearray, lines_before: int) -> None:
    """Only the first can be too long: the buffer is emptied of whole lines as soon as it is a window."""
    if len(buffer) > MAX_LINE_BYTES and not 0 <= buffer.find(b"\n") <= MAX_LINE_BYTES:
        raise LineTooLongError(line=lines_before + 1, limit_bytes=MAX_LINE_BYTES)


def _bounded(text: bytes) -> Iterator[tuple[bytes, int]]:
    """The text in blocks of a bounded number of lines: very short lines cost more than their bytes."""
    count = line_count(text)
    if count <= WINDOW_LINES:
        yield text, count
        return
    lines = text.split(b"\n")
    for start in range(0, count, WINDOW_LINES):
        some = lines[start : start + WINDOW_LINES]
        yield b"\n".join(some), len(some)


def line_count(text: bytes) -> int:
    """How many lines are joined by line feeds."""
    return 1 + len(text) - len(text.replace(b"\n", b""))  # a quarter of what `count` takes, byte by byte


def pieces(text: bytes, size_bytes: int) -> Iterator[bytes]:
    """The same lines in pieces of whole lines, of about that size."""
    start = 0
    while len(text) - start > size_bytes:
        cut = text.rfind(b"\n", start, start + size_bytes)
        if cut < 0:
            cut = text.find(b"\n", start + size_bytes)
            if cut < 0:
                break
        yield text[start:cut]
        start = cut + 1
    yield text[start:]
