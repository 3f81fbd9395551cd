"""Tests of files whose content differs from their name: decoded where that is certain, else failed."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, read_reasons
from tests.support.augmenter_process import read_summary
from tests.support.postings import make_posting
from tests.support.s3_bucket import Bucket

_LINES = [
    make_posting("東京データ" if i % 3 else "Nordlicht GmbH", f"Engineer {i % 4}", id=i) for i in range(40)
]
_TEXT = b"".join(line + b"\n" for line in _LINES)


def _augmented(lines: list[bytes]) -> bytes:
    """Return the expected output of postings."""
    levels = [infer_level(entry["company"], entry["title"]) for entry in map(json.loads, lines)]
    return b"".join(
        line[:-1] + b', "seniority": %d}\n' % level for line, level in zip(lines, levels, strict=True)
    )


_DECODED = {
    "gzip": gzip.compress(_TEXT),
    "zstd": zstandard.compress(_TEXT),
    "gzip twice": gzip.compress(gzip.compress(_TEXT)),
    "zstd in gzip": gzip.compress(zstandard.compress(_TEXT)),
    "UTF-16": _TEXT.decode().encode("utf-16"),
    "UTF-16 big-endian": b"\xfe\xff" + _TEXT.decode().encode("utf-16-be"),
    "byte order marks where files meet": b"\xef\xbb\xbf"
    + _TEXT[:300].rpartition(b"\n")[0]
    + b"\n\xef\xbb\xbf"
    + _TEXT[_TEXT[:300].rindex(b"\n") + 1 :],
    "UTF-16 files that meet": b"".join((line + b"\n").decode().encode("utf-16") for line in _LINES),
    "no line ends": b"".join(_LINES),
    "spaces between": b" \t".join(_LINES),
    "marks between": b"\xef\xbb\xbf".join(_LINES),
    "some line ends": b"".join(line + b"\n" * (i % 3 == 0) for i, line in enumerate(_LINES)),
    "gzip without line ends": gzip.compress(b"".join(_LINES)),
    "CR and LF": _TEXT.replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("kind", _DECODED)
def test_recognised_encoding_is_decoded(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, kind: str
) -> None:
    """Compressed, UTF-16 and concatenated text is decoded, whatever the name of the file."""
    (tmp_path / "a.jsonl").write_bytes(_DECODED[kind])
    result = augment(
        tmp_path / "a.jsonl",
        f"{tmp_path}/out/",
        "--target",
        stub.target,
        "--summary-json",
        tmp_path / "s.json",
    )
    assert (result.exit_code, result.stderr) == (0, "")
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == _augmented(_LINES)
    lines = read_summary(tmp_path / "s.json")["lines"]
    assert (lines["in"], lines["augmented"], lines["rejected"], lines["blank"]) == (40, 40, 0, 0)


def test_output_has_the_format_of_its_name(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """Text in a file named as gzip is read as text, and its output is gzip."""
    (tmp_path / "a.jsonl.gz").write_bytes(_TEXT)
    (tmp_path / "b.jsonl.zst").write_bytes(gzip.compress(_TEXT))
    assert augment(tmp_path, f"{tmp_path}-out/", "--target", stub.target).exit_code == 0
    assert gzip.decompress(Path(f"{tmp_path}-out/a.jsonl.gz").read_bytes()) == _augmented(_LINES)
    output = Path(f"{tmp_path}-out/b.jsonl.zst").read_bytes()
    assert zstandard.ZstdDecompressor().decompressobj().decompress(output) == _augmented(_LINES)


_PRETTY = "\n".join(json.dumps(json.loads(line), indent=2) for line in _LINES).encode()
_UNSUPPORTED = {
    "pretty-printed": (_PRETTY, "pretty-printed"),
    "pretty-printed in gzip": (gzip.compress(_PRETTY), "pretty-printed"),
    "array": (json.dumps(list(map(json.loads, _LINES))).encode(), "JSON array"),
    "array of lines": (b"[\n" + b",\n".join(_LINES) + b"\n]\n", "JSON array"),
    "array of lines, brackets beside": (b"[" + b",\n".join(_LINES) + b"]\n", "JSON array"),
    "object of postings": (b'{"jobs": [\n' + b",\n".join(_LINES) + b"\n]}\n", "pretty-printed"),
    "zip": (b"PK\x03\x04" + bytes(99), "zip"),
    "Parquet": (b"PAR1" + bytes(99), "Parquet"),
    "CSV": (b"company,title\nAcme,Clerk\n", "no line can be augmented (2 rejected): line 1: not JSON"),
    "no posting": (
        b'{"a":1}\n\n{"a":2}\n',
        "no line can be augmented (2 rejected): line 1: company is missing",
    ),
    "refused pairs": (
        make_posting("POISON") + b"\n" + make_posting("NAMED"),
        "no line can be augmented (2 rejected)",
    ),
    "one long line": (b"x" * 5 * 2**20, "no line can be augmented (1 rejected): line 1: longer than 4 MiB"),
}


@pytest.mark.parametrize("kind", _UNSUPPORTED)
@pytest.mark.parametrize("flags", [[], ["--ok-rejects"], ["--dry-run"]])
def test_unsupported_content_fails_with_its_format(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, kind: str, flags: list[str]
) -> None:
    """A file of another format fails with one line that names the format, and has no output."""
    data, message = _UNSUPPORTED[kind]
    if kind == "refused pairs" and flags == ["--dry-run"]:
        return
    (tmp_path / "a.jsonl").write_bytes(data)
    result = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", stub.target, *flags)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"augmenter: {tmp_path}/a.jsonl: ")
    assert message in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "a.jsonl"]


def test_damaged_object_rejects_the_rest_of_its_line(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """Of several objects on one line, those before a damaged one are read, and the rest is rejected."""
    bad = b'{"company":"Ac' + _LINES[2] + _LINES[3]
    (tmp_path / "a.jsonl").write_bytes(
        _LINES[0] + b'{"company":"a"}' + _LINES[1] + bad + b"\n" + _LINES[4] + b"\nbad\n"
    )
    result = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", stub.target)
    assert result.exit_code == 3
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == _augmented([_LINES[0], _LINES[1], _LINES[4]])
    rejects = tmp_path / "out" / "_rejects"
    assert (rejects / "a.jsonl").read_bytes() == b'{"company":"a"}\n' + bad + b"\nbad\n"
    assert [entry["line"] for entry in read_reasons(rejects, "a.jsonl")] == [2, 4, 6]
    assert "6 in = 3 augmented + 3 rejected" in result.stdout


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_line_over_the_limit_is_rejected(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, suffix: str
) -> None:
    """A line over --max-line-bytes is rejected with its reason. The other lines are augmented."""
    long = [make_posting(text="x" * 5 * 2**20, id=i) for i in range(2)]
    lines = [_LINES[0], long[0], b"bad", _LINES[1], long[1] + b"\r", _LINES[2]]
    text = b"\n".join(lines)
    encoded = {".jsonl": text, ".gz": gzip.compress(text), ".zst": zstandard.compress(text)}
    # The name is that of a plain file, so that the outputs are plain.
    (tmp_path / "a.jsonl").write_bytes(encoded[Path(f"a{suffix}").suffix])
    result = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", stub.target)
    assert (result.exit_code, result.stderr) == (3, "")
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == _augmented(_LINES[:3])
    rejects = tmp_path / "out" / "_rejects"
    assert (rejects / "a.jsonl").read_bytes() == long[0] + b"\nbad\n" + long[1] + b"\r\n"
    written_reasons = read_reasons(rejects, "a.jsonl")
    assert [entry["line"] for entry in written_reasons] == [2, 3, 5]
    assert written_reasons[0]["reason"] == "longer than 4 MiB (--max-line-bytes)"


def test_limits_of_line_and_zstd_window_are_settings(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """--max-line-bytes accepts a line of exactly the limit, and --max-zstd-window rejects a larger window."""
    line = make_posting(text="x" * 2000)
    (tmp_path / "a.jsonl").write_bytes(line + b"\n" + make_posting(text="x" * 2001))
    args = ("--target", stub.target, "--max-line-bytes", str(len(line)), "--max-zstd-window", "1MiB")
    result = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", *args)
    assert (result.exit_code, "2 in = 1 augmented + 1 rejected" in result.stdout) == (3, True)
    (tmp_path / "b.jsonl.zst").write_bytes(
        zstandard.compress(b"\n".join([make_posting(text="x" * 2**20)] * 4))
    )
    result = augment(tmp_path / "b.jsonl.zst", f"{tmp_path}/out/", *args)
    assert result.exit_code == 1
    assert "its zstd window is over 1 MiB" in result.stderr
    assert augment(tmp_path / "b.jsonl.zst", f"{tmp_path}/out/", "--target", stub.target).exit_code == 0


def test_megabytes_of_objects_without_line_ends_are_augmented(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """Megabytes of objects on one line are augmented. Only an object over the limit is rejected."""
    lines = [
        make_posting(f"C{i % 9}", "}{" if i % 7 else '"}{"', id=i, text="é}{" * 30) for i in range(8_000)
    ]
    long = make_posting(text="}{" * 3 * 2**20)
    data = b"".join(lines[:5_000]) + long + b"".join(lines[5_000:])
    assert len(data) > 6 * 2**20
    (tmp_path / "a.jsonl").write_bytes(data)
    result = augment(tmp_path / "a.jsonl", f"{tmp_path}/out/", "--target", stub.target)
    assert (result.exit_code, result.stderr) == (3, "")
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == _augmented(lines)
    assert (tmp_path / "out" / "_rejects" / "a.jsonl").read_bytes() == long + b"\n"
    assert [entry["line"] for entry in read_reasons(tmp_path / "out" / "_rejects", "a.jsonl")] == [5_001]


def test_object_with_content_encoding_is_decoded(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """`Content-Encoding: gzip` with a plain name is decoded. A file that fails leaves no object."""
    bucket.put("raw/a.jsonl", gzip.compress(_TEXT), ContentEncoding="gzip")
    bucket.put("raw/b.jsonl", _PRETTY)
    result = augment(
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--endpoint-url",
        bucket.endpoint_url,
        "--target",
        stub.target,
        "--ok-rejects",
    )
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "pretty-printed" in result.stderr
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == ["mod/a.jsonl"]
    assert bucket.get("mod/a.jsonl") == _augmented(_LINES)
    assert bucket.count_unfinished_uploads() == 0
