"""L1: what it keeps, and what it takes."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.l1 import L1Cache


def _digest(number: int) -> bytes:
    return number.to_bytes(16, "little")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 7)), max_size=200))
def test_it_never_answers_what_was_not_put_last(steps: list[tuple[bool, int, int]]) -> None:
    """A level is the last one put, or none: whatever was dropped in between."""
    cache, known = L1Cache(max_bytes=160 * 12), {}
    for is_put, number, level in steps:
        if is_put:
            cache.put(_digest(number), level, epoch=0)
            known[number] = level
        else:
            assert cache.get(_digest(number)) in {0, known.get(number, 0)}
        assert cache.size_bytes <= 160 * 12


@pytest.mark.parametrize("entries", [50_000, 87_000, 88_000, 120_000])
def test_its_bound_holds_in_real_memory(entries: int) -> None:
    """However full its dicts happen to be, what Python allocates stays within the bound."""
    max_bytes = entries * 160
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        cache = L1Cache(max_bytes=max_bytes)
        for number in range(entries * 3):
            cache.put(_digest(number), number % 7 + 1, epoch=0)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= max_bytes * 1.02
    assert cache.size_bytes <= max_bytes
    assert cache.entries >= entries * 0.45


def test_a_scan_of_cold_pairs_leaves_the_hot_ones() -> None:
    """Pairs that are asked for now and then outlive ten times the cache's size of pairs asked once."""
    cache = L1Cache(max_bytes=160 * 2000)
    hot = [_digest(number) for number in range(200)]
    for digest in hot:
        cache.put(digest, 4, epoch=0)
    kept = 0
    for cold in range(20_000):
        cache.put(_digest(1_000_000 + cold), 1, epoch=0)
        if cold % 2 == 0:
            kept += cache.get(hot[cold // 2 % 200]) == 4
    assert kept == 10_000


def test_without_room_it_remembers_nothing() -> None:
    """`--l1-max-bytes 0` is no cache, not an unbounded one."""
    cache = L1Cache(max_bytes=0)
    cache.put(_digest(1), 3, epoch=0)
    assert (cache.get(_digest(1)), cache.entries) == (0, 0)


def test_what_was_invalidated_does_not_come_back() -> None:
    """Removed or cleared, it is gone from both generations, and a look-up that began before puts nothing."""
    l1 = L1Cache(max_bytes=10**6)
    l1.put(b"a" * 16, 3, epoch=l1.epoch)
    before = l1.epoch
    l1.remove(b"a" * 16)
    l1.put(b"a" * 16, 3, epoch=before)
    assert l1.get(b"a" * 16) == 0
    l1.put(b"a" * 16, 4, epoch=l1.epoch)
    assert l1.get(b"a" * 16) == 4
    before = l1.epoch
    l1.clear()
    l1.put(b"b" * 16, 3, epoch=before)
    assert l1.entries == 0
