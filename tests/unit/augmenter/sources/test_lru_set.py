"""Tests of the bounded set of names."""

from services.augmenter.sources.lru_set import LruSet


def test_lru_set_drops_least_recently_used_name() -> None:
    """A full set drops the name that was neither added nor found for the longest time."""
    names = LruSet(max_size=2)
    for name in "ab":
        names.add(name)
    assert "a" in names
    names.add("c")
    assert [name in names for name in "abc"] == [True, False, True]
