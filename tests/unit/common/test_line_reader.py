"""Blocks of lines: nothing lost at their seams, memory bounded."""

import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import json_objects, line_reader

_BOM = b"\xef\xbb\xbf"


async def _chunked(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def _read_chunks(data: bytes, size: int) -> list[line_reader.LineChunk]:
    return [block async for block in line_reader.read_line_chunks(_chunked(data, size))]


async def _read_lines(data: bytes, size: int) -> list[bytes]:
    """Every line, those over the limit put together again and marked."""
    found: list[bytes] = []
    long = b""
    for block in await _read_chunks(data, size):
        if isinstance(block, line_reader.LongLinePart):
            long += block.text
            if block.is_last:
                found.append(b"long:" + long)
                long = b""
        else:
            assert not long
            found += [line for piece in block for line in piece.text.split(b"\n")]
    assert not long
    return found


@pytest.fixture(scope="module", autouse=True)
def small() -> object:
    """Windows of a few bytes and lines, so that small texts have many seams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_reader, "CHUNK_BYTES", 8)
        patch.setattr(line_reader, "CHUNK_LINES", 3)
        patch.setattr(line_reader, "MAX_LINE_BYTES", 20)
        patch.setattr(line_reader, "_BLOCK_BYTES", 5)
        yield


@given(
    st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    st.integers(1, 30),
)
async def test_every_line_is_yielded_once(given_lines: list[bytes], size: int) -> None:
    """However the bytes arrive, blocks hold the text's lines in order, each of bounded length and counted."""
    data = b"".join(line + b"\n" for line in given_lines)
    blocks = await _read_chunks(data, size)
    pieces = [piece for block in blocks if isinstance(block, list) for piece in block]
    assert [line for piece in pieces for line in piece.text.split(b"\n")] == given_lines
    assert all(piece.line_count == 1 + piece.text.count(b"\n") for piece in pieces)
    assert all(piece.line_count == 1 or len(piece.text) <= 5 for piece in pieces)
    assert all(isinstance(block, list) for block in blocks)
    assert all(
        0 < sum(piece.line_count for piece in block) <= 3 for block in blocks if isinstance(block, list)
    )


@given(
    st.lists(
        st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"").replace(b"{", b"x")), max_size=8
    ),
    st.integers(1, 50),
)
async def test_line_over_limit_is_yielded_in_parts(given_lines: list[bytes], size: int) -> None:
    """However the bytes arrive, exactly the lines over the limit come in parts, in their places, whole."""
    data = b"".join(line + b"\n" for line in given_lines)
    expected = [b"long:" + line if len(line) > 20 else line for line in given_lines]
    assert await _read_lines(data, size) == expected
    if given_lines and given_lines[-1]:  # a last line without an end
        assert await _read_lines(data[:-1], size) == expected


@given(st.integers(1, 9), st.integers(1, 200))
async def test_parts_of_long_line_have_bounded_size(size: int, windows: int) -> None:
    """A line of any length is never held whole."""
    blocks = await _read_chunks(b"x" * 8 * windows, size)
    assert all(
        len(block.text) <= 20 + 2 * 8 for block in blocks if isinstance(block, line_reader.LongLinePart)
    )


_OBJECTS = st.dictionaries(
    st.sampled_from(["a", "}{"]), st.sampled_from([1, "}{", '"}{', "", [{}]]), max_size=2
)


@given(
    st.lists(st.tuples(_OBJECTS, st.sampled_from([b"", b" ", b"\xef\xbb\xbf", b"\n", b"\r\n"])), max_size=9),
    st.integers(1, 60),
)
async def test_objects_without_line_feed_between_are_lines(
    given_objects: list[tuple[dict[str, object], bytes]], size: int
) -> None:
    """However the bytes arrive, whatever stands between: each object is a line, or in one to be split."""
    data = b"".join(json.dumps(value).encode() + between for value, between in given_objects)
    found = [line.removeprefix(b"long:") for line in await _read_lines(data, size)]
    parts = [part.replace(_BOM, b"").strip() for line in found for part in json_objects.split_objects(line)]
    assert [json.loads(part) for part in parts if part] == [value for value, _ in given_objects]


@given(st.lists(_OBJECTS.map(json.dumps), min_size=1, max_size=9), st.integers(1, 60))
async def test_object_over_limit_ends_at_next_object(given_objects: list[str], size: int) -> None:
    """Of objects without line ends between them only those over the limit are long lines."""
    found = await _read_lines("".join(given_objects).encode(), size)
    parts = [[line] if line.startswith(b"long:") else json_objects.split_objects(line) for line in found]
    assert [part.decode() for some in parts for part in some] == [
        f"long:{text}" if len(text) > 20 else text for text in given_objects
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
    assert await _read_lines(text, 4) == expected


@pytest.mark.parametrize("size", [1, 5, 8, 100])
@pytest.mark.parametrize("end", [b"", b"\n", b"\nafter\n"])
async def test_line_of_exactly_the_limit_is_not_split(size: int, end: bytes) -> None:
    """One byte more makes the difference, wherever the bytes are cut."""
    after = end.split(b"\n")[1:-1]
    assert await _read_lines(b"a\n" + b"x" * 20 + end, size) == [b"a", b"x" * 20, *after]
    assert await _read_lines(b"a\n" + b"x" * 21 + end, size) == [b"a", b"long:" + b"x" * 21, *after]


@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), min_size=2, max_size=9))
def test_split_in_half_keeps_all_lines(given_lines: list[bytes]) -> None:
    """Both have lines, together the same in order, and are counted."""
    halves = line_reader.LineBlock(b"\n".join(given_lines), len(given_lines)).split_in_half()
    assert [line for half in halves for line in half.text.split(b"\n")] == given_lines
    assert [half.line_count for half in halves] == [1 + half.text.count(b"\n") for half in halves]
