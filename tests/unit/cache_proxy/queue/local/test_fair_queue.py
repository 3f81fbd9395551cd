"""One lane, fair between callers."""

from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.domain import Pair
from services.cache_proxy.queue.local.fair_queue import FairQueue, QueuedPair, QueuePosition


def _entry(number: int, caller: str) -> QueuePosition:
    entry = QueuedPair(Pair(number.to_bytes(16, "big"), "c", "t"), caller, 0.0)
    return QueuePosition(entry, "interactive", caller)


def _take(lane: FairQueue, count: int) -> list[QueuePosition]:
    """As a batch is taken: the first so many, the lane's time being the last one's start."""
    taken = [entry for entry, _ in zip(lane, range(count), strict=False)]
    for entry in taken:
        lane.advance(entry.start_tag)
    for entry in taken:
        lane.remove(entry)
    return taken


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 30), min_size=1), st.integers(1, 20))
def test_nobody_gets_a_second_more_than_another_that_waits(counts: dict[str, int], batch: int) -> None:
    """As long as two callers have a backlog, what they got differs by one at most, in each caller's order."""
    lane = FairQueue()
    numbers = iter(range(1000))
    for caller, count in counts.items():
        for _ in range(count):
            lane.add(_entry(next(numbers), caller))
    got = dict.fromkeys(counts, 0)
    order: dict[str, list[bytes]] = {caller: [] for caller in counts}
    while len(lane):
        for entry in _take(lane, batch):
            got[entry.caller] += 1
            order[entry.caller].append(entry.entry.pair.digest)
        waiting = [got[caller] for caller in counts if got[caller] < counts[caller]]
        if waiting:
            assert max(waiting) - min(waiting) <= 1
    assert got == counts
    assert all(digests == sorted(digests) for digests in order.values())


@given(st.lists(st.sampled_from(["add a", "add b", "take", "put back", "remove"]), max_size=60))
def test_what_goes_out_is_in_the_order_of_its_starts_and_none_is_lost(steps: list[str]) -> None:
    """Through coming, going and coming back; what comes back is in front of all that came since."""
    lane, numbers = FairQueue(), iter(range(1000))
    inside: list[QueuePosition] = []
    out: list[QueuePosition] = []
    for step in steps:
        if step.startswith("add"):
            inside.append(_entry(next(numbers), step[-1]))
            lane.add(inside[-1])
        elif step == "take":
            out = _take(lane, 3)
            inside = [entry for entry in inside if entry not in out]
        elif step == "put back" and out:
            for entry in reversed(out):
                lane.add(entry, at_front=True)
            front = set(map(id, list(lane)[: len(out)]))
            assert front == set(map(id, out))
            inside += out
            out = []
        elif step == "remove" and inside:
            lane.remove(inside.pop())
        starts = [entry.start_tag for entry in lane]
        assert starts == sorted(starts)
        assert sorted(map(id, lane)) == sorted(map(id, inside))
        assert len(lane) == len(inside)


def test_who_comes_late_starts_with_the_others_and_not_before_them() -> None:
    """A caller that was idle has saved nothing up."""
    lane = FairQueue()
    for number in range(100):
        lane.add(_entry(number, "busy"))
    _take(lane, 50)
    for number in range(200, 220):
        lane.add(_entry(number, "late"))
    callers = [entry.caller for entry in _take(lane, 20)]
    assert abs(callers.count("late") - 10) <= 1


def test_names_beyond_a_hundred_share_a_turn_and_memory_is_given_back() -> None:
    """Nothing stays of callers that are gone."""
    lane = FairQueue()
    for number in range(3000):
        lane.add(_entry(number, f"caller {number}"))
    assert len(lane._by_caller) <= 101
    assert len(_take(lane, 3000)) == 3000
    assert (lane._by_caller, lane._finish_tags, lane.virtual_time, len(lane)) == ({}, {}, 0.0, 0)
