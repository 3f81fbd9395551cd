"""Tests of files and runs that fail, and of their exit codes."""

import gzip
import json
import re
from pathlib import Path

import pytest

from services.augmenter import stats
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.postings import make_posting


def test_exit_codes_of_rejects_and_failures(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """The exit code is 3 for rejected lines, 0 if they are tolerated, and 1 if a file failed."""
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jsonl").write_bytes(b"bad\n" + make_posting())
    common = ("--target", stub.target, "--overwrite")
    assert augment(source, tmp_path / "out", *common).exit_code == 3
    assert augment(source, tmp_path / "out", *common, "--ok-rejects").exit_code == 0
    (source / "b.jsonl.gz").write_bytes(gzip.compress(make_posting())[:-3])
    result = augment(source, tmp_path / "out", *common, "--summary-json", tmp_path / "s.json")
    assert result.exit_code == 1
    assert result.stderr == f"augmenter: {source}/b.jsonl.gz: the compressed input is cut short\n"
    assert not (tmp_path / "out" / "b.jsonl.gz").exists()
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["files"] == {"done": 1, "skipped": 0, "failed": 1}
    assert [failure["file"] for failure in summary["failures"]] == [f"{source}/b.jsonl.gz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_rejects", "a.jsonl"]


def test_unreachable_target_fails_the_file_by_name(augment: RunAugmenter, tmp_path: Path) -> None:
    """If the target is unreachable, the file fails once its retry budget is spent, in one line."""
    source = tmp_path / "a.jsonl"
    source.write_bytes(make_posting())
    result = augment(source, tmp_path / "b.jsonl", "--target", "127.0.0.1:1", "--retry-budget", "1s")
    assert result.exit_code == 1
    warning, failure = result.stderr.splitlines()
    assert "retrying" in warning
    assert failure.startswith(f"augmenter: {source}: 127.0.0.1:1 answered UNAVAILABLE: ")
    assert "retried for 1." in failure
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_unusable_input_or_output_is_one_line(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """A missing input, or an output that cannot be created, ends with exit code 1 and one line."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(make_posting())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(make_posting())
    missing = tmp_path / "missing"
    blocked = file / "out"
    for source, sink, named in (
        (missing, tmp_path / "out", missing),
        (tmp_path / "in", blocked, blocked),
        (file, "/proc/nowhere/", "/proc/nowhere"),
    ):
        result = augment(source, sink, "--target", stub.target)
        assert result.exit_code == 1
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"augmenter: {named}: ")


def test_output_that_cannot_be_written_fails_one_file(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path
) -> None:
    """A folder at the path of an output fails that file, and no other."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jsonl").write_bytes(make_posting())
    (tmp_path / "out" / "a.jsonl").mkdir(parents=True)
    result = augment(tmp_path / "in", tmp_path / "out", "--target", stub.target)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"augmenter: {tmp_path}/in/a.jsonl: ")
    assert (tmp_path / "out" / "b.jsonl").is_file()


def test_first_failures_are_named_at_the_end_and_others_when_they_happen(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All failures are counted. The first are named at the end of the run, the others when they happen."""
    monkeypatch.setattr(stats, "MAX_NAMED_FAILURES", 2)
    source = tmp_path / "in"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.jsonl.gz").write_bytes(b"no gzip")
    result = augment(
        source,
        tmp_path / "out",
        "--target",
        stub.target,
        "--summary-json",
        tmp_path / "s.json",
        "--concurrency",
        "1",
    )
    assert result.exit_code == 1
    assert "0 done, 0 skipped, 5 failed" in result.stdout
    named = re.findall(r"(/\S+): ", result.stderr)
    assert named == [f"{source}/{i}.jsonl.gz" for i in (2, 3, 4, 0, 1)]
    assert result.stderr.splitlines()[-1] == "augmenter: and 3 more, named when they failed"
    totals = json.loads((tmp_path / "s.json").read_text())
    assert totals["files"]["failed"] == 5
    assert [failure["file"] for failure in totals["failures"]] == [f"{source}/{i}.jsonl.gz" for i in (0, 1)]
