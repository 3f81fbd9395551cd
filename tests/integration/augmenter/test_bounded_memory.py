"""What a run remembers of its files, however many months it goes on."""

import json
import re
from pathlib import Path

import pytest

from services.augmenter import stats
from services.augmenter.sources.lru_set import LruSet
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub


def test_of_failures_the_first_are_named_at_the_end(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure is counted, and named once: the first at the end, the others when they happen."""
    monkeypatch.setattr(stats, "MAX_NAMED_FAILURES", 2)
    source = tmp_path / "in"
    source.mkdir()
    for i in range(5):
        (source / f"{i}.jsonl.gz").write_bytes(b"no gzip")
    ended = augment(
        source,
        tmp_path / "out",
        "--target",
        stub.target,
        "--summary-json",
        tmp_path / "s.json",
        "--concurrency",
        "1",
    )
    assert ended.exit_code == 1
    assert "0 done, 0 skipped, 5 failed" in ended.stdout
    named = re.findall(r"(/\S+): ", ended.stderr)
    assert named == [f"{source}/{i}.jsonl.gz" for i in (2, 3, 4, 0, 1)]
    assert ended.stderr.splitlines()[-1] == "augmenter: and 3 more, named when they failed"
    told = json.loads((tmp_path / "s.json").read_text())
    assert told["files"]["failed"] == 5
    assert [failure["file"] for failure in told["failures"]] == [f"{source}/{i}.jsonl.gz" for i in (0, 1)]


def test_a_failure_that_passed_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file counts once however often it fails, and no more once it is done."""
    monkeypatch.setattr(stats, "MAX_NAMED_FAILURES", 2)
    failures = stats.Failures()
    assert [failures.add(name, "broken") for name in "abac"] == [True, True, True, False]
    assert (failures.count, list(failures.reasons_by_file)) == (3, ["a", "b"])
    failures.mark_resolved("a")
    failures.mark_resolved("never failed")
    assert failures.add("d", "broken")
    assert (failures.count, list(failures.reasons_by_file)) == (3, ["b", "d"])


def test_what_is_recent_is_bounded() -> None:
    """Of more than fit, those that were noted or asked for longest ago are forgotten."""
    recent = LruSet(max_size=2)
    for name in "ab":
        recent.add(name)
    assert "a" in recent
    recent.add("c")
    assert [name in recent for name in "abc"] == [True, False, True]
