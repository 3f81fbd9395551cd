"""Tests that what a run remembers of its files is bounded, even after months."""

import json
import re
from pathlib import Path

import pytest

from services.augmenter import stats
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub


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
