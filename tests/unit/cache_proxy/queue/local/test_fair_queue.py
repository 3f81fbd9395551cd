"""The fair queue: equal shares of callers, order within a caller, and reset when empty."""

from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.domain import Pair
from services.cache_proxy.queue.local.fair_queue import FairQueue, QueuedPair, QueuePosition


def _position(number: int, caller: str) -> QueuePosition:
    entry = QueuedPair(Pair(number.to_bytes(16, "big"), "c", "t"), caller, 0.0)
    return QueuePosition(entry, "interactive", caller)


def _take(queue: FairQueue, count: int) -> list[QueuePosition]:
    """Take the first positions, as a batch is taken: the virtual time advances to the last start tag."""
    taken = [entry for entry, _ in zip(queue, range(count), strict=False)]
    for entry in taken:
        queue.advance(entry.start_tag)
    for entry in taken:
        queue.remove(entry)
    return taken


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 30), min_size=1), st.integers(1, 20))
def test_waiting_callers_get_equal_shares(counts: dict[str, int], batch: int) -> None:
    """While two callers wait, the numbers of their taken pairs differ by at most one.

    Each caller's pairs are taken in their order.
    """
    queue = FairQueue()
    numbers = iter(range(1000))
    for caller, count in counts.items():
        for _ in range(count):
            queue.add(_position(next(numbers), caller))
    taken_counts = dict.fromkeys(counts, 0)
    order: dict[str, list[bytes]] = {caller: [] for caller in counts}
    while len(queue):
        for entry in _take(queue, batch):
            taken_counts[entry.caller] += 1
            order[entry.caller].append(entry.entry.pair.digest)
        waiting = [taken_counts[caller] for caller in counts if taken_counts[caller] < counts[caller]]
        if waiting:
            assert max(waiting) - min(waiting) <= 1
    assert taken_counts == counts
    assert all(digests == sorted(digests) for digests in order.values())


@given(st.lists(st.sampled_from(["add a", "add b", "take", "return", "remove"]), max_size=60))
def test_order_follows_start_tags_and_no_position_is_lost(steps: list[str]) -> None:
    """Whatever is added, taken, returned and removed. Returned positions come before all later ones."""
    queue = FairQueue()
    numbers = iter(range(1000))
    inside: list[QueuePosition] = []
    out: list[QueuePosition] = []
    for step in steps:
        if step.startswith("add"):
            inside.append(_position(next(numbers), step[-1]))
            queue.add(inside[-1])
        elif step == "take":
            out = _take(queue, 3)
            inside = [entry for entry in inside if entry not in out]
        elif step == "return" and out:
            for entry in reversed(out):
                queue.add(entry, at_front=True)
            front = set(map(id, list(queue)[: len(out)]))
            assert front == set(map(id, out))
            inside += out
            out = []
        elif step == "remove" and inside:
            queue.remove(inside.pop())
        starts = [entry.start_tag for entry in queue]
        assert starts == sorted(starts)
        assert sorted(map(id, queue)) == sorted(map(id, inside))
        assert len(queue) == len(inside)


def test_idle_caller_gets_no_advantage() -> None:
    """A caller that was idle shares equally from its first pair on."""
    queue = FairQueue()
    for number in range(100):
        queue.add(_position(number, "busy"))
    _take(queue, 50)
    for number in range(200, 220):
        queue.add(_position(number, "late"))
    callers = [entry.caller for entry in _take(queue, 20)]
    assert abs(callers.count("late") - 10) <= 1


def test_callers_beyond_limit_share_one_flow_and_memory_is_freed() -> None:
    """Nothing is kept of callers without positions."""
    queue = FairQueue()
    for number in range(3000):
        queue.add(_position(number, f"caller {number}"))
    assert len(queue._by_caller) <= 101
    assert len(_take(queue, 3000)) == 3000
    assert (queue._by_caller, queue._finish_tags, queue.virtual_time, len(queue)) == ({}, {}, 0.0, 0)
