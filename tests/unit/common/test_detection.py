"""What a file is, by its first bytes against its name."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from services.common import codec
from services.common.codec import format_for_name
from services.common.detection import DetectingDecoder
from services.common.errors import CorruptInputError, FileError, UnreadableFormatError, WindowTooLargeError

_TEXT = b"".join(json.dumps({"company": f"株 {i}", "title": "Clerk"}).encode() + b"\n" for i in range(3_000))
_NAMES = ("a.jsonl", "a.JSON.gz", "a.ndjson.zst")


def _decoded(data: bytes, *, name: str = "a.jsonl", piece: int = 2**20) -> bytes:
    known = format_for_name(name)
    assert known
    decoder = DetectingDecoder(known)
    found = b""
    for start in range(0, len(data), piece):
        found += b"".join(decoder.feed(data[start : start + piece]))
    return found + b"".join(decoder.finish())


def _zip(text: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", text)
    return file.getvalue()


def _tar(text: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(text)
        archive.addfile(info, io.BytesIO(text))
    return file.getvalue()


_PACKED: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda text: text,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "gzip twice": lambda text: gzip.compress(gzip.compress(text)),
    "zstd in gzip": lambda text: gzip.compress(zstandard.compress(text)),
    "gzip in zstd": lambda text: zstandard.compress(gzip.compress(text)),
    "zstd twice": lambda text: zstandard.compress(zstandard.compress(text)),
    "gzip three times": lambda text: gzip.compress(gzip.compress(gzip.compress(text))),
    "two members": lambda text: gzip.compress(text[:70]) + gzip.compress(text[70:]),
    "UTF-8 with a mark": lambda text: codecs.BOM_UTF8 + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "UTF-16 BE": lambda text: codecs.BOM_UTF16_BE + text.decode().encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.decode().encode("utf-16-le"),
    "UTF-16 BE without a mark": lambda text: text.decode().encode("utf-16-be"),
    "UTF-32": lambda text: text.decode().encode("utf-32"),
    "UTF-32 BE": lambda text: codecs.BOM_UTF32_BE + text.decode().encode("utf-32-be"),
    "UTF-16 in gzip": lambda text: gzip.compress(text.decode().encode("utf-16")),
}


@pytest.mark.parametrize("packed", _PACKED)
@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("text", [_TEXT, _TEXT[:120].rpartition(b"\n")[0]])
def test_content_takes_precedence_over_name(packed: str, name: str, text: bytes) -> None:
    """Whatever the name says, what the bytes say is decoded, however they arrive."""
    data = _PACKED[packed](text)
    for piece in (10_000, 2**20) if len(text) > 1000 else (1, 7):
        assert _decoded(data, name=name, piece=piece).removeprefix(codecs.BOM_UTF8) == text


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (_zip(_TEXT), "zip"),
        (bz2.compress(_TEXT), "bzip2"),
        (lzma.compress(_TEXT), "xz"),
        (b"PAR1\x15\x04\x15\x10" + bytes(100), "Parquet"),
        (b"Obj\x01\x04\x16avro.schema", "Avro"),
        (b"ORC\x08\x03" + bytes(100), "ORC"),
        (b"\x04\x22\x4d\x18\x64\x40\xa7" + bytes(9), "lz4"),
        (b"\xff\x06\x00\x00sNaPpY" + bytes(9), "snappy"),
        (b"SQLite format 3\x00" + bytes(100), "SQLite"),
        (b"%PDF-1.7\n", "PDF"),
        (zlib.compress(_TEXT), "zlib"),
        (_tar(_TEXT), "tar"),
    ],
)
@pytest.mark.parametrize("name", _NAMES)
def test_unsupported_format_is_reported_by_name(data: bytes, named: str, name: str) -> None:
    """What is not read is refused by its true name, also inside a gzip."""
    for packed in (data, gzip.compress(data)):
        with pytest.raises(UnreadableFormatError, match=named):
            _decoded(packed, name=name)


_ITEMS = [{"company": "Acme", "title": "}\n{"}, {"company": "Acme", "title": "Clerk", "more": [{"a": 1}]}]


@pytest.mark.parametrize("count", [1, 2, 500])
@pytest.mark.parametrize("indent", [0, 1, 4, "\t"])
@pytest.mark.parametrize("before", [b"", codecs.BOM_UTF8, b"\r\n \n"])
def test_json_over_several_lines_is_reported(count: int, indent: int | str, before: bytes) -> None:
    """Pretty-printed objects and arrays are refused as what they are, of any size, and with any line end."""
    items = (_ITEMS * count)[:count]
    objects = "\n".join(json.dumps(item, indent=indent) for item in items)
    array = json.dumps(items, indent=indent)
    commas = ",\n".join(json.dumps(item) for item in [*items, *items, *items])
    lines = "[" + ",\n".join(json.dumps(item) for item in [*items, *items]) + "]\n"
    for text, named in (
        (objects, "pretty-printed"),
        (array, "JSON array"),
        (lines, "JSON array"),
        (commas, "commas"),
    ):
        for written in (text, text.replace("\n", "\r\n")):
            with pytest.raises(UnreadableFormatError, match=named):
                _decoded(before + written.encode())


def test_one_huge_pretty_printed_object_is_reported() -> None:
    """The first bytes suffice, also when a string in them does not end there."""
    text = json.dumps({"company": "Acme", "text": "x" * 2**20, "title": "Clerk"}, indent=1)
    with pytest.raises(UnreadableFormatError, match="pretty-printed"):
        _decoded(text.encode())


@pytest.mark.parametrize("size", [2**16 - 30, 2**16, 10**5, 2**20 - 30, 3 * 2**20])
@pytest.mark.parametrize("piece", [2**16, 2**20])
def test_long_first_line_does_not_prevent_detection(size: int, piece: int) -> None:
    """Of what begins with a long object on the first line, no later one is taken for a line of its own."""
    long, item = json.dumps({"company": "x" * size, "title": "y"}), json.dumps(_ITEMS[1])
    array = f"[{long},\n{item},\n{item}\n]\n"
    with pytest.raises(UnreadableFormatError, match="JSON array"):
        _decoded(array.encode(), piece=piece)
    if size < 2**20 - 100:
        with pytest.raises(UnreadableFormatError, match="pretty-printed"):
            _decoded(f'{{"jobs":[{long},\n{item}\n]}}\n'.encode(), piece=piece)
    lines = f"{long}\n{item}\n".encode()
    assert _decoded(lines, piece=piece) == lines


@pytest.mark.parametrize(
    "first",
    [
        b'{"company":"Ac',
        b'{"company":"Acme",',
        b'{"company":"Acme"',
        b'{"company":',
        b'{"company":\n}',
        b"{",
        b"[2026-12-01] started",
        b'["a","b"]',
        b"[]",
        b'[{"company":"a"}]',
        b"company,title",
        b"\0\0\0\0\0",
        b"null",
        b'{"a":1}{"b":2}',
        b'{"a":1},',
        b"<p>",
        b"[" * 70_000,
        b'{"a":' * 70_000,
        b'{"company":"Acme","title": ',
        b'{"company":"Acme","tags":[',
        b'{"company":"Acme","tags":["a",',
        b'{"company":"Acme","more":{"a":\r',
        b"[",
    ],
)
def test_invalid_first_line_does_not_reject_file(first: bytes) -> None:
    """Lines are lines if the first one does not go on, as JSON, on the second."""
    data = first + b"\n" + _TEXT
    assert _decoded(data) == data


def test_array_on_one_line_gives_hint() -> None:
    """Should no line of the file be augmented, this is why."""
    decoder = DetectingDecoder(codec.PLAIN)
    assert (
        b"".join([*decoder.feed(json.dumps(_ITEMS).encode()), *decoder.finish()])
        == json.dumps(_ITEMS).encode()
    )
    assert decoder.hint
    assert "JSON array" in decoder.hint


def test_commas_on_one_line_give_hint() -> None:
    """Should no line of the file be augmented, the commas between its objects are why."""
    for comma in (b",", b", ", b" ,"):
        data = comma.join(json.dumps(item).encode() for item in _ITEMS)
        decoder = DetectingDecoder(codec.PLAIN)
        assert b"".join([*decoder.feed(data), *decoder.finish()]) == data
        assert decoder.hint
        assert "commas" in decoder.hint


@pytest.mark.parametrize("before", [codecs.BOM_UTF8 * 2, b"\n" + codecs.BOM_UTF8, codecs.BOM_UTF8 + b" \r\n"])
def test_array_behind_marks_and_blank_lines_is_reported(before: bytes) -> None:
    """Concatenation leaves several byte order marks; the array behind them has no line of its own."""
    text = before + ("[\n" + ",\n".join(map(json.dumps, _ITEMS)) + "\n]\n").encode()
    with pytest.raises(UnreadableFormatError, match="JSON array"):
        _decoded(text)
    lines = before + _TEXT
    assert _decoded(lines, name="a.jsonl.gz") == lines


def test_commas_at_line_starts_are_reported() -> None:
    """The first of such lines alone is an object: it is not to be augmented by itself."""
    items = list(map(json.dumps, [*_ITEMS, *_ITEMS]))
    for comma in ("\n,", "\r\n , "):
        with pytest.raises(UnreadableFormatError, match="commas"):
            _decoded(comma.join(items).encode())
    one_bad_line = f"{items[0]}\n,{items[1]}\n{items[0]}\n".encode()
    assert _decoded(one_bad_line) == one_bad_line


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("before", ["\n", " ", "\r\n"])
def test_utf_16_without_mark_behind_white_space_is_decoded(encoding: str, before: str) -> None:
    """Two characters of ASCII tell the encoding."""
    text = before + _TEXT.decode()
    assert _decoded(text.encode(encoding)) == text.encode()
    array = json.dumps(_ITEMS, indent=1).encode(encoding)
    with pytest.raises(UnreadableFormatError, match="JSON array"):
        _decoded(array)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_content_neither_compressed_nor_json_is_corrupt(name: str) -> None:
    """A compressed file's name, zeros or any other text in it: the one line says so."""
    for data in (b"\0" * 5000, b"company,title\nAcme,Clerk\n", b"\xff" * 10):
        with pytest.raises(CorruptInputError, match=r"begins neither as (gzip|zstd) nor as JSON"):
            _decoded(data, name=name)
    assert _decoded(b"", name=name) == b""
    assert _decoded(b"\n \n", name=name) == b"\n \n"


@pytest.mark.parametrize("packed", ["gzip", "zstd", "gzip twice", "zstd in gzip", "UTF-16", "UTF-32 BE"])
@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_truncated_file_is_reported_for_any_name(packed: str, cut: int) -> None:
    """A file that ends too early says so, in every layer."""
    data = _PACKED[packed](_TEXT)[:-cut]
    if packed.startswith("UTF") and cut % (2 if "16" in packed else 4) == 0:
        return
    with pytest.raises(CorruptInputError, match="cut short"):
        _decoded(data)


def test_lone_surrogate_invalidates_only_its_line() -> None:
    """UTF-16 that holds half a character is text that is not valid on that line only."""
    text = '{"company":"\ud800","title":"a"}\n{"company":"b","title":"c"}\n'
    data = codecs.BOM_UTF16_LE + text.encode("utf-16-le", errors="surrogatepass")
    assert _decoded(data).removeprefix(codecs.BOM_UTF8) == text.encode(errors="surrogatepass")


def test_too_many_compression_layers_are_rejected() -> None:
    """Nobody packs ten times over but to do harm."""
    data = _TEXT
    for _ in range(10):
        data = gzip.compress(data)
    with pytest.raises(UnreadableFormatError, match="more than 3 times"):
        _decoded(data)


def test_window_limit_applies_to_every_layer() -> None:
    """The setting is that of the inner zstd too."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=22)
    encoder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = gzip.compress(encoder.compress(_TEXT) + encoder.flush())
    assert _decoded(data) == _TEXT
    decoder = DetectingDecoder(codec.PLAIN, max_zstd_window_bytes=2**21)
    with pytest.raises(WindowTooLargeError, match="over 2 MiB"):
        list(decoder.feed(data))


@given(st.binary(max_size=300), st.sampled_from(_NAMES), st.integers(1, 64))
def test_any_bytes_are_decoded_or_rejected(data: bytes, name: str, piece: int) -> None:
    """Whatever the bytes: an error of its own kind, or a text; and cut anyhow, the same."""
    results: list[bytes | type[FileError]] = []
    for size in (piece, 1000):
        try:
            results.append(_decoded(data, name=name, piece=size))
        except FileError as error:
            results.append(type(error))
    assert results[0] == results[1]
