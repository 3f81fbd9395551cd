"""The bounded mapping under L1: what it keeps, and what it takes."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.cache.slru import SegmentedLru
from tests.support.processes import ROOT, clean_environment

_KEY_BYTES = 160  # of an entry with a key of `_key`, rounded up


def _key(number: int) -> bytes:
    return number.to_bytes(16, "little")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 7)), max_size=200))
def test_it_never_gives_what_was_not_put_last(steps: list[tuple[bool, int, int]]) -> None:
    """A value is the last one put, or none: whatever was dropped or moved in between."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_KEY_BYTES * 12)
    known: dict[int, int] = {}
    for is_put, number, value in steps:
        if is_put:
            cache.put(_key(number), value)
            known[number] = value
        else:
            assert cache.get(_key(number)) in {None, known.get(number)}
        assert cache.size_bytes <= _KEY_BYTES * 12


@pytest.mark.parametrize("scan", [10_000, 100_000])
def test_a_scan_leaves_what_was_asked_for_twice(scan: int) -> None:
    """A hundred keys asked for twice outlive, unasked, any number of keys that are asked for once."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_KEY_BYTES * 1000)
    for number in range(100):
        cache.put(_key(number), 4)
        cache.get(_key(number))
    for number in range(1000, 1000 + scan):
        cache.put(_key(number), 1)
    assert all(cache.get(_key(number)) == 4 for number in range(100))
    assert cache.get(_key(1000)) is None


def test_a_new_value_takes_the_old_ones_place() -> None:
    """Whether a key was asked for once or twice, it has one value: the last."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_KEY_BYTES * 10)
    for value in range(1, 5):
        cache.put(_key(1), value)
        assert [cache.get(_key(1)), cache.get(_key(1)), cache.entries] == [value, value, 1]


def test_what_is_no_longer_asked_for_makes_room() -> None:
    """Keys that were popular once leave when as many others are popular: nothing is kept for its past."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_KEY_BYTES * 200)
    for number in range(1000):
        cache.put(_key(number), 4)
        cache.get(_key(number))
    assert cache.get(_key(0)) is None
    assert cache.get(_key(999)) == 4


@pytest.mark.parametrize("max_bytes", [0, 1, 100])
def test_without_room_it_remembers_nothing(max_bytes: int) -> None:
    """A bound of 0, or below one entry, is no cache, not an unbounded one."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=max_bytes)
    cache.put(_key(1), 3)
    assert (cache.get(_key(1)), cache.entries, cache.size_bytes) == (None, 0, 0)


def test_a_key_over_the_bound_pushes_nobody_out() -> None:
    """One that is larger than its half of the cache is not remembered; the others stay."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_KEY_BYTES * 20)
    cache.put(_key(1), 3)
    cache.put(b"x" * _KEY_BYTES * 10, 3)
    assert (cache.get(_key(1)), cache.entries) == (3, 1)


_FILL = """
import sys
from services.cache_proxy.cache.slru import SegmentedLru
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
least, most, bound = (int(argument) for argument in sys.argv[1:])
cache = SegmentedLru(max_bytes=bound)
peak = 0
for number in range(1_500_000):
    key = b"%d " % number
    key += b"k" * (least + number % (most - least + 1) - len(key))
    cache.put(key, 5)
    if number % 3 == 0:
        cache.get(key)
    if number % 50_000 == 0:
        peak = max(peak, resident() - before)
print(cache.entries, cache.size_bytes, max(peak, resident() - before))
"""


@pytest.mark.parametrize(
    ("least", "most"),
    [
        pytest.param(10, 10, id="short"),
        pytest.param(20, 60, id="usual"),
        pytest.param(100, 700, id="long"),
    ],
)
@pytest.mark.slow
def test_its_bound_holds_in_the_memory_of_a_process(least: int, most: int) -> None:
    """However many entries go through it, resident memory grows by the bound and a tenth at most."""
    bound = 96 * 2**20
    ran = subprocess.run(
        [sys.executable, "-c", _FILL, str(least), str(most), str(bound)],
        check=True,
        capture_output=True,
        text=True,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
    )
    entries, size, resident = (int(number) for number in ran.stdout.split())
    assert bound * 0.95 <= size <= bound
    assert bound * 0.8 <= resident <= bound * 1.1
    assert entries > bound // (most + 150)
