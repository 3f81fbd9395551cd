"""Tests of counting the names that a listing ignores."""

import pytest

from services.common.storage.input_listing import NameCounts, ignored_suffix


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.csv", ".csv"),
        ("deep/a.CSV", ".csv"),
        ("a.csv.gz", ".csv.gz"),
        ("a.jsonl.bz2", ".jsonl.bz2"),
        ("a.gz", ".gz"),
        ("README", "no suffix"),
        ("a.1714605540", "other"),
        ("a.a-very-long-suffix", "other"),
        (".hidden.jsonl", "hidden"),
        (".git/a.jsonl", "hidden"),
        ("_rejects/a.jsonl", "_rejects"),
        ("a.jsonl.reasons.jsonl", ".reasons.jsonl"),
    ],
)
def test_ignored_names_are_counted_by_suffix(name: str, suffix: str) -> None:
    """The suffix is in lower case. A compressed file has both of its suffixes."""
    assert ignored_suffix(name) == suffix


def test_number_of_ignored_suffixes_is_bounded() -> None:
    """The summary has a limited number of suffixes, and markers of folders are not names."""
    name_counts = NameCounts()
    for number in range(100):
        name_counts.count_ignored(f"a.x{number}")
    name_counts.count_ignored("folder/")
    name_counts.count_ignored("")
    assert (len(name_counts.ignored), name_counts.ignored["other"], name_counts.ignored.total()) == (
        21,
        80,
        100,
    )
