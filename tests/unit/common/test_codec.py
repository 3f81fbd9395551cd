"""Formats: streaming both ways, concatenated parts, damaged input."""

import gzip
import random

import pytest
import zstandard

from services.common.codec import GZIP, PLAIN, SUFFIXES, ZSTD, Format, format_for_name
from services.common.errors import CorruptInputError, WindowTooLargeError

_TEXT = b'{"company":"Acme","title":"Clerk"}\n' * 2_000


def _decoded(name: str, data: bytes, *, piece: int) -> bytes:
    known = format_for_name(name)
    assert known
    decoder = known.decoder()
    decoded = b"".join(
        out for start in range(0, len(data), piece) for out in decoder.feed(data[start : start + piece])
    )
    decoder.finish()
    return decoded


def _encoded(name: str, text: bytes) -> bytes:
    known = format_for_name(name)
    assert known
    encoder = known.encoder()
    half = len(text) // 2
    return encoder.compress(text[:half]) + encoder.compress(text[half:]) + encoder.flush()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("text", [b"", _TEXT, random.Random(1).randbytes(50_000)])
def test_encoded_text_is_decoded_unchanged(suffix: str, text: bytes) -> None:
    """Each format gives back what went in, however the bytes are cut on their way."""
    data = _encoded(f"a{suffix}", text)
    assert _decoded(f"a{suffix}", data, piece=1 if len(data) < 1000 else 999) == text


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_concatenated_frames_are_decoded_as_one_text(piece: int) -> None:
    """Gzip members (zero padding between too) and zstd frames follow one another, as their tools allow."""
    members = gzip.compress(b"a\n") + b"\0\0" + gzip.compress(b"") + gzip.compress(b"b\n") + b"\0" * 9
    frames = zstandard.compress(b"a\n") + zstandard.compress(b"") + zstandard.compress(b"b\n")
    assert _decoded("x.jsonl.gz", members, piece=piece) == b"a\nb\n"
    assert _decoded("x.jsonl.zst", frames, piece=piece) == b"a\nb\n"


@pytest.mark.parametrize(
    ("name", "whole"),
    [("x.jsonl.gz", gzip.compress(_TEXT)), ("x.jsonl.zst", zstandard.compress(_TEXT))],
)
def test_damaged_input_raises_corrupt_input_error(name: str, whole: bytes) -> None:
    """Input that is cut short, not of its format, or followed by something else is said to be damaged."""
    for damaged, said in (
        (whole[:-1], "cut short"),
        (whole[:3], "cut short"),
        (b"plain text\n", "corrupt: it does not begin as"),
        (whole + b"plain text\n", "corrupt"),
        (whole[: len(whole) // 2] + b"\xff\x00\xff\x00" * 8 + whole[len(whole) // 2 :], "corrupt|cut short"),
    ):
        with pytest.raises(CorruptInputError, match=said):
            _decoded(name, damaged, piece=64)


def test_file_without_bytes_is_empty_text() -> None:
    """An empty file is an empty text, whatever its name says."""
    assert {_decoded(f"x{suffix}", b"", piece=1) for suffix in SUFFIXES} == {b""}


def test_decoded_chunks_stay_small_at_any_compression_ratio() -> None:
    """A small input that holds a large text comes out in pieces, never at once."""
    known = format_for_name("x.jsonl.gz")
    assert known
    pieces = [len(piece) for piece in known.decoder().feed(gzip.compress(bytes(64 * 2**20)))]
    assert sum(pieces) == 64 * 2**20
    assert max(pieces) < 5 * 2**20


@pytest.mark.parametrize(
    "name", ["a.csv", "jsonl", "a.jsonl.bz2", "a.gz", "a.jsonl.gz.gz", "ajson", "a.jsonl "]
)
def test_unknown_suffix_has_no_format(name: str) -> None:
    """Only names of lines of JSON, plain or compressed, have a format."""
    assert format_for_name(name) is None


@pytest.mark.parametrize("base", [".jsonl", ".ndjson", ".jl", ".json", ".JSONL", ".Json"])
@pytest.mark.parametrize(
    ("compression", "known"), [("", PLAIN), (".gz", GZIP), (".zst", ZSTD), (".GZ", GZIP), (".Zst", ZSTD)]
)
def test_json_lines_suffix_has_its_format(base: str, compression: str, known: Format) -> None:
    """Every usual suffix is known, in any case."""
    assert format_for_name(f"a/b.c{base}{compression}") is known


@pytest.mark.parametrize("behind", [b"x", b"\n", b"PK", b"\x1f", b"\x28\xb5"])
@pytest.mark.parametrize("piece", [1, 2**20])
def test_trailing_bytes_are_reported(behind: bytes, piece: int) -> None:
    """Even one byte behind a gzip or a zstd is not called cut short: it is not part of the data."""
    for name, whole in (("x.jsonl.gz", gzip.compress(b"a")), ("x.jsonl.zst", zstandard.compress(b"a"))):
        with pytest.raises(CorruptInputError, match=r"bytes that are not .* follow"):
            _decoded(name, whole + behind, piece=piece)


def test_skippable_zstd_frames_are_skipped() -> None:
    """Tools put their own frames in front of the data: no text, no error."""
    skipped = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    whole = skipped + zstandard.compress(b"text") + skipped
    assert _decoded("x.jsonl.zst", whole, piece=1) == b"text"


def test_file_of_zeros_is_not_gzip() -> None:
    """What a crashed disk leaves is corrupt, not empty; padding counts only behind a member."""
    decoder = format_for_name("a.jsonl.gz")
    assert decoder
    with pytest.raises(CorruptInputError):
        list(decoder.decoder().feed(b"\0" * 5000))


def test_small_zstd_input_is_decoded_in_bounded_chunks() -> None:
    """128 MiB of line ends in 4 KiB come out in pieces that fit into memory."""
    bomb = zstandard.compress(b"\n" * 2**27)
    decoder = format_for_name("a.jsonl.zst")
    assert decoder
    assert max(map(len, decoder.decoder().feed(bomb))) <= 2**23 + 2**18


@pytest.mark.parametrize(("window_log", "taken"), [(23, True), (24, False), (27, False), (31, False)])
def test_zstd_window_is_bounded(window_log: int, *, taken: bool) -> None:
    """A window of 8 MiB is read; one that would take more is refused by its own name, not called corrupt."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=window_log)
    encoder = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = encoder.compress(_TEXT) + encoder.flush()
    if taken:
        assert _decoded("x.jsonl.zst", data, piece=7) == _TEXT
        return
    with pytest.raises(WindowTooLargeError, match="window is over 8 MiB"):
        _decoded("x.jsonl.zst", data, piece=7)


@pytest.mark.parametrize("level", [1, 3, 19])
def test_output_of_every_zstd_level_is_decoded(level: int) -> None:
    """Every level but the ultra ones stays within the window, also for a text of many times its size."""
    text = random.Random(1).randbytes(2**20) * 10
    assert _decoded("x.jsonl.zst", zstandard.compress(text, level), piece=2**20) == text
