"""Tests of a run's counters."""

import pytest

from services.augmenter import stats


def test_resolved_failure_frees_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that failed counts once, and no more once it is done, so that another can be named."""
    monkeypatch.setattr(stats, "MAX_NAMED_FAILURES", 2)
    failures = stats.Failures()
    assert [failures.add(name, "broken") for name in "abac"] == [True, True, True, False]
    assert (failures.count, list(failures.reasons_by_file)) == (3, ["a", "b"])
    failures.mark_resolved("a")
    failures.mark_resolved("never failed")
    assert failures.add("d", "broken")
    assert (failures.count, list(failures.reasons_by_file)) == (3, ["b", "d"])
