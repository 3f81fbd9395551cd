"""The segmented LRU cache: what it keeps, and the memory that it takes."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.cache.slru import SegmentedLru
from tests.support.processes import ROOT, clean_environment

# The size of an entry with a key of `_key`, rounded up.
_ENTRY_BYTES = 160


def _key(number: int) -> bytes:
    return number.to_bytes(16, "little")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 7)), max_size=200))
def test_look_up_returns_only_the_last_value(steps: list[tuple[bool, int, int]]) -> None:
    """A look-up returns the last value stored or a miss, whatever was evicted or promoted before."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_ENTRY_BYTES * 12)
    known: dict[int, int] = {}
    for is_put, number, value in steps:
        if is_put:
            cache.put(_key(number), value)
            known[number] = value
        else:
            assert cache.get(_key(number)) in {None, known.get(number)}
        assert cache.size_bytes <= _ENTRY_BYTES * 12


@pytest.mark.parametrize("scan", [10_000, 100_000])
def test_scan_does_not_evict_keys_requested_twice(scan: int) -> None:
    """A hundred keys that were requested twice survive any number of keys that are requested once."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_ENTRY_BYTES * 1000)
    for number in range(100):
        cache.put(_key(number), 4)
        cache.get(_key(number))
    for number in range(1000, 1000 + scan):
        cache.put(_key(number), 1)
    assert all(cache.get(_key(number)) == 4 for number in range(100))
    assert cache.get(_key(1000)) is None


def test_new_value_replaces_old_one() -> None:
    """A key in either segment has one value, the last."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_ENTRY_BYTES * 10)
    for value in range(1, 5):
        cache.put(_key(1), value)
        assert [cache.get(_key(1)), cache.get(_key(1)), cache.entries] == [value, value, 1]


def test_keys_no_longer_requested_are_evicted() -> None:
    """Protected keys are evicted when as many other keys are requested twice after them."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_ENTRY_BYTES * 200)
    for number in range(1000):
        cache.put(_key(number), 4)
        cache.get(_key(number))
    assert cache.get(_key(0)) is None
    assert cache.get(_key(999)) == 4


@pytest.mark.parametrize("max_bytes", [0, 1, 100])
def test_bound_below_one_entry_stores_nothing(max_bytes: int) -> None:
    """A bound of 0, or below the size of an entry, does not mean an unbounded cache."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=max_bytes)
    cache.put(_key(1), 3)
    assert (cache.get(_key(1)), cache.entries, cache.size_bytes) == (None, 0, 0)


def test_key_larger_than_bound_evicts_nothing() -> None:
    """A key that is larger than its segment is not stored; the others stay."""
    cache: SegmentedLru[int] = SegmentedLru(max_bytes=_ENTRY_BYTES * 20)
    cache.put(_key(1), 3)
    cache.put(b"x" * _ENTRY_BYTES * 10, 3)
    assert (cache.get(_key(1)), cache.entries) == (3, 1)


_FILL = """
import sys
from services.cache_proxy.cache.slru import SegmentedLru
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
min_length, max_length, bound = (int(argument) for argument in sys.argv[1:])
cache = SegmentedLru(max_bytes=bound)
peak = 0
for number in range(1_500_000):
    key = b"%d " % number
    key += b"k" * (min_length + number % (max_length - min_length + 1) - len(key))
    cache.put(key, 5)
    if number % 3 == 0:
        cache.get(key)
    if number % 50_000 == 0:
        peak = max(peak, resident() - before)
print(cache.entries, cache.size_bytes, max(peak, resident() - before))
"""


@pytest.mark.parametrize(
    ("min_length", "max_length"),
    [
        pytest.param(10, 10, id="short"),
        pytest.param(20, 60, id="usual"),
        pytest.param(100, 700, id="long"),
    ],
)
@pytest.mark.slow
def test_bound_holds_for_resident_memory_of_process(min_length: int, max_length: int) -> None:
    """Resident memory grows by at most 1.1 times the bound, however many entries are stored."""
    bound = 96 * 2**20
    ran = subprocess.run(
        [sys.executable, "-c", _FILL, str(min_length), str(max_length), str(bound)],
        check=True,
        capture_output=True,
        text=True,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
    )
    entries, size, resident = (int(number) for number in ran.stdout.split())
    assert bound * 0.95 <= size <= bound
    assert bound * 0.8 <= resident <= bound * 1.1
    assert entries > bound // (max_length + 150)
