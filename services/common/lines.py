"""A stream of bytes cut into windows of whole lines, in bounded memory."""

from collections.abc import AsyncGenerator, AsyncIterator

from services.common.errors import LineTooLongError

WINDOW_BYTES = 4 * 2**20
WINDOW_LINES = 20_000
MAX_LINE_BYTES = 64 * 2**20
BOM = b"\xef\xbb\xbf"


async def windows(chunks: AsyncIterator[bytes]) -> AsyncGenerator[list[bytes]]:
    """Lists of lines without their line feed, which alone ends a line; a last line may lack it."""
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
            block = bytes(memoryview(buffer)[:cut])
            del buffer[: cut + 1]
            for lines in _split(block):
                lines_before += len(lines)
                yield lines
    _check_first_line(buffer, lines_before)
    if buffer:
        for lines in _split(bytes(buffer).removesuffix(b"\n")):
            yield lines


def _check_first_line(buffer: bytearray, lines_before: int) -> None:
    """Only the first can be too long: the buffer is emptied of whole lines as soon as it is a window."""
    if len(buffer) > MAX_LINE_BYTES and not 0 <= buffer.find(b"\n") <= MAX_LINE_BYTES:
        raise LineTooLongError(line=lines_before + 1, limit_bytes=MAX_LINE_BYTES)


def _split(block: bytes) -> list[list[bytes]]:
    """The block's lines, in lists of a bounded length."""
    lines = block.split(b"\n")
    return [lines[start : start + WINDOW_LINES] for start in range(0, len(lines), WINDOW_LINES)]
