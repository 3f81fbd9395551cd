"""What goes into a batch: interactive first, a tenth for bulk, within pairs and bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.domain import Pair
from services.cache_proxy.queue.local.fair_queue import QueuedPair, QueuePosition
from services.cache_proxy.queue.local.quota_limiter import QuotaLimiter
from services.cache_proxy.queue.local.scheduler import BatchScheduler


def _lanes(interactive: int, bulk: int, *, text: str = "") -> BatchScheduler:
    lanes = BatchScheduler(QuotaLimiter(slot_seconds=1.0, replicas=lambda: 1, now=0.0))
    for priority, count in (("interactive", interactive), ("bulk", bulk)):
        for number in range(count):
            name = f"{priority}{number}"
            entry = QueuedPair(Pair(name.encode(), name, text), "caller", float(number))
            entry.positions.append(QueuePosition(entry, priority, "caller"))
            lanes.add(entry)
    return lanes


def _composed(lanes: BatchScheduler, *, batch_pairs: int, batch_bytes: int = 10**9) -> dict[str, int]:
    chosen, _ = lanes.take_batch(batch_pairs=batch_pairs, batch_bytes=batch_bytes, now=0.0)
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
def test_interactive_goes_first_and_bulk_keeps_a_tenth(
    interactive: int, bulk: int, expected: tuple[int, int]
) -> None:
    """Bulk fills what interactive leaves, and never less than a tenth; no place stays empty."""
    composed = _composed(_lanes(interactive, bulk), batch_pairs=1000)
    assert (composed["interactive"], composed["bulk"]) == expected


def test_bulks_tenth_holds_in_bytes_too() -> None:
    """Long interactive texts fill the bytes of every batch, and still bulk gets its part of them."""
    composed = _composed(_lanes(2000, 2000, text="x" * 1000), batch_pairs=1000, batch_bytes=100_000)
    assert composed["bulk"] >= 9
    assert composed["interactive"] >= 80


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 30), st.integers(1, 4000), st.integers(0, 300))
def test_a_batch_is_full_and_within_its_bounds(
    interactive: int, bulk: int, batch_pairs: int, batch_bytes: int, length: int
) -> None:
    """Never over either bound (but a pair that is too large alone goes alone), never short of both."""
    lanes = _lanes(interactive, bulk, text="x" * length)
    chosen, _ = lanes.take_batch(batch_pairs=batch_pairs, batch_bytes=batch_bytes, now=0.0)
    sizes = [entry.pair.size_bytes for entry in chosen]
    assert len(set(map(id, chosen))) == len(chosen) <= batch_pairs
    assert sum(sizes) <= batch_bytes or len(chosen) == 1
    if interactive + bulk:
        assert chosen
        left = [entry.pair.size_bytes for entry in lanes.entries() if entry not in chosen]
        full = len(chosen) == batch_pairs or not left or sum(sizes) + 2 * max(left) > batch_bytes
        assert full


def test_a_promoted_entry_waits_in_the_better_lane_alone() -> None:
    """The better priority of two callers counts, and only upwards."""
    lanes = _lanes(1, 2)
    entry = lanes.entries()[1]
    for priority in ("interactive", "bulk"):
        place = lanes.position_for(entry, priority=priority, account=None, caller="caller")
        if place is not None:
            lanes.add_position(entry, place)
    assert (lanes.count("interactive"), lanes.count("bulk"), len(lanes)) == (2, 1, 3)
    size = lanes.size_bytes
    assert lanes.discard(entry)
    assert not lanes.discard(entry)
    assert lanes.size_bytes == size - entry.pair.size_bytes
