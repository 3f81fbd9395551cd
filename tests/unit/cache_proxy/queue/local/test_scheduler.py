"""Batches: interactive pairs first, a tenth reserved for bulk, within the limits in pairs and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.domain import Pair
from services.cache_proxy.queue.local.fair_queue import QueuedPair, QueuePosition
from services.cache_proxy.queue.local.quota_limiter import QuotaLimiter
from services.cache_proxy.queue.local.scheduler import BatchScheduler


def _make_scheduler(interactive: int, bulk: int, *, text: str = "") -> BatchScheduler:
    scheduler = BatchScheduler(QuotaLimiter(slot_seconds=1.0, replicas=lambda: 1, now=0.0))
    for priority, count in (("interactive", interactive), ("bulk", bulk)):
        for number in range(count):
            name = f"{priority}{number}"
            entry = QueuedPair(Pair(name.encode(), name, text), "caller", float(number))
            entry.positions.append(QueuePosition(entry, priority, "caller"))
            scheduler.add(entry)
    return scheduler


def _batch_counts(scheduler: BatchScheduler, *, batch_pairs: int, batch_bytes: int = 10**9) -> dict[str, int]:
    chosen, _ = scheduler.take_batch(batch_pairs=batch_pairs, batch_bytes=batch_bytes, now=0.0)
    return {
        name: sum(entry.positions[0].priority == name for entry in chosen) for name in ("interactive", "bulk")
    }


@pytest.mark.parametrize(
    ("interactive", "bulk", "expected"),
    [
        (5, 5, (5, 5)),
        (2000, 0, (1000, 0)),
        (0, 2000, (0, 1000)),
        (2000, 2000, (900, 100)),
        (2000, 30, (970, 30)),
        (400, 2000, (400, 600)),
        (950, 2000, (900, 100)),
    ],
)
def test_interactive_goes_first_and_bulk_keeps_its_reserve(
    interactive: int, bulk: int, expected: tuple[int, int]
) -> None:
    """Bulk fills what interactive leaves, at least a tenth. No place of a batch stays empty."""
    counts = _batch_counts(_make_scheduler(interactive, bulk), batch_pairs=1000)
    assert (counts["interactive"], counts["bulk"]) == expected


def test_bulk_reserve_applies_to_bytes() -> None:
    """Long interactive texts fill the bytes of every batch, and bulk still gets its part."""
    counts = _batch_counts(
        _make_scheduler(2000, 2000, text="x" * 1000), batch_pairs=1000, batch_bytes=100_000
    )
    assert counts["bulk"] >= 9
    assert counts["interactive"] >= 80


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.integers(1, 4000), st.integers(0, 300))
def test_batch_is_full_and_within_limits(
    interactive: int, bulk: int, batch_pairs: int, batch_bytes: int, length: int
) -> None:
    """Neither limit is exceeded, except by a single pair that is too large, and no space is wasted."""
    scheduler = _make_scheduler(interactive, bulk, text="x" * length)
    chosen, _ = scheduler.take_batch(batch_pairs=batch_pairs, batch_bytes=batch_bytes, now=0.0)
    sizes = [entry.pair.size_bytes for entry in chosen]
    assert len(set(map(id, chosen))) == len(chosen) <= batch_pairs
    assert sum(sizes) <= batch_bytes or len(chosen) == 1
    if interactive + bulk:
        assert chosen
        left = [entry.pair.size_bytes for entry in scheduler.entries() if entry not in chosen]
        is_full = len(chosen) == batch_pairs or not left or sum(sizes) + 2 * max(left) > batch_bytes
        assert is_full


def test_joined_pair_moves_to_higher_priority_only() -> None:
    """The higher priority of two callers counts."""
    scheduler = _make_scheduler(1, 2)
    entry = scheduler.entries()[1]
    for priority in ("interactive", "bulk"):
        position = scheduler.position_for(entry, priority=priority, account=None, caller="caller")
        if position is not None:
            scheduler.add_position(entry, position)
    assert (scheduler.count("interactive"), scheduler.count("bulk"), len(scheduler)) == (2, 1, 3)
    size = scheduler.size_bytes
    assert scheduler.discard(entry)
    assert not scheduler.discard(entry)
    assert scheduler.size_bytes == size - entry.pair.size_bytes
