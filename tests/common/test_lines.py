"""Windows of lines: nothing lost at their seams, memory bounded."""

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import lines
from services.common.errors import LineTooLongError


async def _pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def _windows(data: bytes, size: int) -> list[list[bytes]]:
    return [window async for window in lines.windows(_pieces(data, size))]


@pytest.fixture(scope="module", autouse=True)
def small() -> object:
    """Windows of a few bytes and lines, so that small texts have many seams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "WINDOW_BYTES", 8)
        patch.setattr(lines, "WINDOW_LINES", 3)
        patch.setattr(lines, "MAX_LINE_BYTES", 20)
        patch.setattr(lines, "_PIECE_BYTES", 5)
        yield


@given(
    st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    st.integers(1, 30),
)
async def test_every_line_comes_out_once(given_lines: list[bytes], size: int) -> None:
    """However the bytes arrive, blocks hold the text's lines in order, each of bounded length and counted."""
    data = b"".join(line + b"\n" for line in given_lines)
    blocks = [block async for block in lines.blocks(_pieces(data, size))]
    pieces = [piece for block in blocks for piece in block]
    assert [line for piece in pieces for line in piece.text.split(b"\n")] == given_lines
    assert all(piece.count == 1 + piece.text.count(b"\n") for piece in pieces)
    assert all(piece.count == 1 or len(piece.text) <= 5 for piece in pieces)
    assert all(0 < sum(piece.count for piece in block) <= 3 for block in blocks)
    assert await _windows(data, size) == [
        [line for piece in block for line in piece.text.split(b"\n")] for block in blocks
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", []),
        (b"\n", [b""]),
        (b"a", [b"a"]),
        (b"a\nb", [b"a", b"b"]),
        (b"a\rb\x0bc\xe2\x80\xa8\n", [b"a\rb\x0bc\xe2\x80\xa8"]),
    ],
)
async def test_only_line_feeds_end_lines(text: bytes, expected: list[bytes]) -> None:
    """A last line needs no end; no other character of Unicode's many ends a line."""
    assert [line for window in await _windows(text, 4) for line in window] == expected


@pytest.mark.parametrize("size", [1, 5, 8])
@pytest.mark.parametrize("end", [b"", b"\n", b"\nafter\n"])
async def test_line_over_the_limit_is_refused(size: int, end: bytes) -> None:
    """A line over the limit is an error that names it, wherever it is cut; one at the limit is not."""
    assert (await _windows(b"a\n" + b"x" * 20 + end, size))[-1][-1] in {b"x" * 20, b"after"}
    with pytest.raises(LineTooLongError, match="line 2 is longer"):
        await _windows(b"a\n" + b"x" * 21 + end, size)


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), min_size=2, max_size=9))
def test_halves_are_the_lines(given_lines: list[bytes]) -> None:
    """Both have lines, together the same in order, and are counted."""
    halves = lines.Piece(b"\n".join(given_lines), len(given_lines)).halves()
    assert [line for half in halves for line in half.text.split(b"\n")] == given_lines
    assert [half.count for half in halves] == [1 + half.text.count(b"\n") for half in halves]
