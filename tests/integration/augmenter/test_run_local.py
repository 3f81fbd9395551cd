"""Tests of `augmenter run` on local files: outputs, skipped files and exit codes."""

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from services.common.codec import format_for_name
from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, StartStub
from tests.support.postings import make_posting
from tests.support.processes import read_stub_log


def _level(company: str = "Acme", title: str = "Clerk") -> bytes:
    return b', "seniority": %d}\n' % infer_level(company, title)


def test_folder_keeps_names_order_and_bytes(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """Files of a folder, at any depth and in every format, are written under their names with levels."""
    lines = [make_posting(f"C{i % 7}", f"Engineer {i % 3}", id=i) for i in range(50)]
    text = b"".join(line + b"\n" for line in lines)
    source = tmp_path / "in"
    sink = tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    (source / "1.jsonl").write_bytes(text)
    (source / "deep" / "2.jsonl.gz").write_bytes(gzip.compress(text))
    (source / "3.jsonl.zst").write_bytes(zstandard.compress(text))
    for ignored in ("notes.txt", ".hidden.jsonl", "x.json.bz2"):
        (source / ignored).write_bytes(text)
    (source / ".git").mkdir()
    (source / ".git" / "4.jsonl").write_bytes(text)
    result = augment(source, sink, "--target", stub.target)
    expected = b"".join(line[:-1] + _level(f"C{i % 7}", f"Engineer {i % 3}") for i, line in enumerate(lines))
    assert result.exit_code == 0
    outputs = sorted(path.relative_to(sink).as_posix() for path in sink.rglob("*") if path.is_file())
    assert outputs == ["1.jsonl", "3.jsonl.zst", "deep/2.jsonl.gz"]
    assert (sink / "1.jsonl").read_bytes() == expected
    assert gzip.decompress((sink / "deep" / "2.jsonl.gz").read_bytes()) == expected
    zst = zstandard.ZstdDecompressor().decompressobj().decompress((sink / "3.jsonl.zst").read_bytes())
    assert zst == expected
    assert result.stderr == ""
    assert "3 done, 0 skipped, 0 failed" in result.stdout
    assert "150 in = 150 augmented + 0 rejected + 0 blank" in result.stdout


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("text", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_file_without_postings_gives_an_empty_output(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, suffix: str, text: bytes
) -> None:
    """An empty file, and one of blank lines, give an empty text in the file's format."""
    file_format = format_for_name(f"a{suffix}")
    assert file_format
    encoder = file_format.encoder()
    decoder = file_format.decoder()
    packed = encoder.compress(text) + encoder.flush() if text else b""
    (tmp_path / f"a{suffix}").write_bytes(packed)
    assert augment(tmp_path / f"a{suffix}", f"{tmp_path}/out/", "--target", stub.target).exit_code == 0
    assert b"".join(decoder.feed((tmp_path / "out" / f"a{suffix}").read_bytes())) == b""
    assert list(decoder.finish()) == []
    assert not (tmp_path / "out" / "_rejects").exists()


def test_finished_file_is_skipped_and_changed_one_is_redone(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """A file whose output exists is skipped, unless the input has changed or --overwrite is set."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    source.mkdir()
    (source / "a.jsonl").write_bytes(b"bad\n" + make_posting())
    assert augment(source, sink, "--target", stub.target).exit_code == 3
    assert (sink / "a.jsonl").stat().st_mtime_ns == (source / "a.jsonl").stat().st_mtime_ns
    assert (sink / "_rejects" / "a.jsonl").exists()
    result = augment(source, sink, "--target", "127.0.0.1:1")
    assert (result.exit_code, "0 done, 1 skipped" in result.stdout) == (0, True)
    assert "1 done" in augment(source, sink, "--target", stub.target, "--overwrite", "--ok-rejects").stdout
    (source / "a.jsonl").write_bytes(make_posting(title="Chief"))
    os.utime(source / "a.jsonl", ns=(1, 1))
    result = augment(source, sink, "--target", stub.target)
    assert (result.exit_code, "1 done, 0 skipped" in result.stdout) == (0, True)
    assert (sink / "a.jsonl").read_bytes() == make_posting(title="Chief")[:-1] + _level(title="Chief")
    assert not list((sink / "_rejects").iterdir())


def test_pairs_are_sent_once_in_full_batches(
    augment: RunAugmenter, stub_with: StartStub, tmp_path: Path
) -> None:
    """Distinct pairs are sent once each, in batches of --batch-size."""
    stub = stub_with()
    lines = [make_posting(f"C{i % 250}") for i in range(2_000)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    result = augment(
        tmp_path / "a.jsonl",
        f"{tmp_path}/out/",
        "--target",
        stub.target,
        "--batch-size",
        "100",
        "--summary-json",
        tmp_path / "s.json",
    )
    assert result.exit_code == 0
    calls = read_stub_log(stub.log_path)
    assert sorted(len(call["pairs"]) for call in calls) == [50, 100, 100]
    assert len({tuple(pair) for call in calls for pair in call["pairs"]}) == 250
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["rpcs"], summary["pairs"]) == (3, {"asked": 250, "hits": 0, "misses": 0})


def test_batch_of_long_texts_stays_below_the_message_limit(
    augment: RunAugmenter, stub_with: StartStub, tmp_path: Path
) -> None:
    """Batches stay within the default message limit of a gRPC server, however long titles are."""
    stub = stub_with()
    lines = [make_posting(title=f"{i}" + "x" * 2**18) for i in range(16)]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines)))
    assert augment(tmp_path / "a.jsonl.zst", f"{tmp_path}/out/", "--target", stub.target).exit_code == 0
    sizes = [len(call["pairs"]) for call in read_stub_log(stub.log_path)]
    # Twelve titles take 3 MiB.
    assert (sum(sizes), max(sizes) <= 12) == (16, True)


def test_dry_run_counts_and_writes_nothing(augment: RunAugmenter, tmp_path: Path) -> None:
    """A dry run reports lines, distinct pairs, calls and time, and sends and writes nothing."""
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a", "b"):
        lines = [make_posting(f"C{i}") for i in range(1_500)]
        (source / f"{name}.jsonl").write_bytes(b"\n".join([*lines, b"bad", b""]))
    result = augment(source, tmp_path / "out", "--dry-run")
    assert result.exit_code == 0
    assert "2 to do" in result.stdout
    assert "3,002, 2 of them to be rejected" in result.stdout
    assert "1,500 distinct" in result.stdout
    assert "at most 2 calls to the model, 2 s" in result.stdout
    assert not (tmp_path / "out").exists()


def test_progress_bar_and_metrics_endpoint_are_optional(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """--progress draws a bar on standard error, and --http-listen logs the address of the metrics."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    result = augment(
        tmp_path / "a.jsonl",
        f"{tmp_path}/out/",
        "--target",
        stub.target,
        "--progress",
        "true",
        "--http-listen",
        "127.0.0.1:0",
    )
    assert result.exit_code == 0
    assert "1/1 files" in result.stderr
    assert "metrics on http://127.0.0.1:" in result.stderr


def test_environment_variables_set_arguments_and_flags(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """INPUT, OUTPUT and flags may come from the environment. A flag overrides its variable."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    for name, value in (
        ("INPUT", str(tmp_path / "a.jsonl")),
        ("OUTPUT", f"{tmp_path}/out/"),
        ("TARGET", "127.0.0.1:1"),
        ("UNKNOWN", "ignored"),
    ):
        monkeypatch.setenv(f"AUGMENTER_{name}", value)
    assert augment("--target", stub.target).exit_code == 0
    assert (tmp_path / "out" / "a.jsonl").read_bytes() == make_posting()[:-1] + _level()
