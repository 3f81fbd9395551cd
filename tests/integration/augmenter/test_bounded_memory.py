"""Tests that what a run remembers of its files is bounded, even after months."""

import json
import re
from pathlib import Path

import pytest

from services.augmenter import stats
from services.augmenter.sources.lru_set import LruSet
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub


def test_first_failures_are_named_at_the_end_and_others_when_they_happen(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure is counted, and named once."""
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


def test_resolved_failure_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file counts once however often it fails, and no more once it is done."""
    monkeypatch.setattr(stats, "MAX_NAMED_FAILURES", 2)
    failures = stats.Failures()
    assert [failures.add(name, "broken") for name in "abac"] == [True, True, True, False]
    assert (failures.count, list(failures.reasons_by_file)) == (3, ["a", "b"])
    failures.mark_resolved("a")
    failures.mark_resolved("never failed")
    assert failures.add("d", "broken")
    assert (failures.count, list(failures.reasons_by_file)) == (3, ["b", "d"])


def test_lru_set_drops_least_recently_used_name() -> None:
    """Names that were neither added nor found for the longest time are dropped."""
    names = LruSet(max_size=2)
    for name in "ab":
        names.add(name)
    assert "a" in names
    names.add("c")
    assert [name in names for name in "abc"] == [True, False, True]
