"""Pairs that several callers wait for: the best priority of all and the latest deadline count, everywhere."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.errors import QueueFull, Refused, StoreError, Unavailable
from services.cache_proxy.observability.metrics import LANES
from services.cache_proxy.queue.interface import Claim
from services.cache_proxy.queue.quotas import Quota, Quotas
from services.cache_proxy.queue.waiters import Wait
from services.cache_proxy.queue.waiting_pairs import Turn, WaitingPair
from tests.support.queue_subjects import Open
from tests.support.replicas import Place, Replica, asker, limits, numbers_of, pair, pairs, replicas

BOUNDS = limits(batch_pairs=2)
LOST = StoreError("no answer")
DOWN = Unavailable("down", retry_after_seconds=1.0)
REFUSED = Refused(StatusCode.INVALID_ARGUMENT, "bad")
LAST = pair(5)
WORSE = pytest.mark.parametrize("worse", ["bulk", "refresh"])


@pytest.fixture
async def replica(shared_redis: str) -> AsyncIterator[Replica]:
    """One whose loss and return of Redis a test plays by hand."""
    async with replicas(Place.new(shared_redis), bounds=BOUNDS) as (opened,):
        await opened.beat()
        yield opened


async def _ask(
    replica: Replica, numbers: list[int], caller: str, priority: str, patience: float = 60
) -> Wait:
    wait = replica.waiters.open([item.digest for item in pairs(numbers)])
    enqueued = await replica.failover.enqueue(pairs(numbers), asker(caller, priority, patience=patience))
    replica.waiters.settle_one(wait, enqueued.ended.items())
    return wait


async def _take(replica: Replica) -> list[int]:
    for _ in range(200):
        decision = await replica.failover.claim()
        if isinstance(decision, Claim):
            return numbers_of(decision)
        assert decision.wait_seconds < 5, decision
        await asyncio.sleep(decision.wait_seconds)
    raise AssertionError("no batch")


async def _lose(replica: Replica) -> None:
    await replica.failover.lose(LOST)
    replica.failover._limiter.begins_at = 0.0


@WORSE
@pytest.mark.parametrize("how", ["fail", "put back", "refuse"])
async def test_pair_joined_in_flight_waits_again_with_the_best_priority(
    how: str, worse: str, opened: Open
) -> None:
    """The batch ends without an answer: the pair goes before what is as urgent as its first caller."""
    async with opened(BOUNDS) as subject:
        await subject.ask([pair(8), pair(9)], asker("b", worse))
        claim = await subject.take()
        await subject.ask([pair(9)], asker("i", "interactive"))
        if how == "fail":
            await subject.queue.fail(claim, DOWN, retry_after_seconds=0)
        elif how == "put back":
            await subject.queue.put_back(claim)
        else:  # the one that is named ends, the other waits again
            await subject.queue.refuse(claim, REFUSED, {pair(8).digest: REFUSED})
        if hasattr(subject.queue, "_not_before"):
            subject.queue._not_before = 0.0
        await subject.ask(pairs(range(4)), asker("c", "interactive"))
        assert 9 in numbers_of(await subject.take())


@WORSE
async def test_suspect_joined_by_a_better_caller_waits_again_with_its_priority(
    worse: str, opened: Open
) -> None:
    """The other half is refused, so the pair is presumed clean: it waits with its best priority."""
    async with opened(BOUNDS) as subject:
        await subject.ask([pair(8), pair(9)], asker("b", worse))
        await subject.queue.refuse(await subject.take(), REFUSED, {})
        await subject.ask([pair(9)], asker("i", "interactive"))
        probe = await subject.take()
        assert numbers_of(probe) == [8]
        await subject.ask(pairs(range(4)), asker("c", "interactive"))
        await subject.queue.refuse(probe, REFUSED, {})
        assert 9 in numbers_of(await subject.take())


@WORSE
async def test_poll_after_a_flush_enqueues_with_the_best_priority(worse: str, replica: Replica) -> None:
    """Redis lost everything: the pair that an interactive caller joined is in the next batch."""
    await _ask(replica, list(range(6)), "b", worse)
    await _ask(replica, [5], "i", "interactive")
    replica.place.flush()
    await replica.beat()
    await replica.queue.ask_again()
    assert 5 in await _take(replica)


@WORSE
async def test_local_queue_takes_over_the_best_priority(worse: str, replica: Replica) -> None:
    """Redis is gone: the joined pair is in the first batch without it."""
    await _ask(replica, list(range(6)), "b", worse)
    await _ask(replica, [5], "i", "interactive")
    await _lose(replica)
    assert 5 in await _take(replica)


@WORSE
@pytest.mark.parametrize("flushed", [False, True])
async def test_return_to_redis_keeps_the_best_priority(flushed: bool, worse: str, replica: Replica) -> None:
    """Joined while Redis was lost: the pair is in the first batch after the return, whatever Redis kept."""
    await _ask(replica, list(range(6)), "b", worse)
    await _lose(replica)
    await _ask(replica, [5], "i", "interactive")
    if flushed:
        replica.place.flush()
        await replica.beat()
    await replica.failover.regain()
    assert 5 in await _take(replica)


@WORSE
async def test_pair_joined_during_the_return_keeps_the_best_priority(worse: str, replica: Replica) -> None:
    """It was enqueued in Redis with its first caller's priority when the better one came."""
    await _ask(replica, list(range(6)), "b", worse)
    await _lose(replica)
    replica.client.slow = (0.1,)
    returning = asyncio.create_task(replica.failover.regain())
    await asyncio.sleep(0.03)
    await _ask(replica, [5], "i", "interactive")
    await returning
    assert 5 in await _take(replica)


async def test_pair_left_and_asked_again_during_the_return_waits_in_redis(replica: Replica) -> None:
    """Its first caller left while it was asked for, so Redis forgot it: the second round asks for it."""
    first = await _ask(replica, [1], "a", "interactive")
    await _lose(replica)
    replica.client.slow = (0.1, 0.1)  # the enqueue, and the leave that follows it
    returning = asyncio.create_task(replica.failover.regain())
    await asyncio.sleep(0.03)
    await replica.failover.leave(replica.waiters.close(first))
    await asyncio.sleep(0.12)
    await _ask(replica, [1], "a", "interactive")
    await returning
    assert await _take(replica) == [1]


@pytest.mark.parametrize("path", ["poll", "failover", "return"])
async def test_latest_deadline_counts_after_the_first_has_passed(path: str, replica: Replica) -> None:
    """The first caller's time is over and it has gone: the pair is still sent for the second."""
    first = await _ask(replica, [1], "a", "interactive", 0.4)
    if path == "return":
        await _lose(replica)
    last = await _ask(replica, [1], "b", "bulk")
    if path == "failover":
        await _lose(replica)
    if path == "poll":
        replica.place.flush()
        await replica.beat()
        await replica.queue.ask_again()
    if path == "return":
        await replica.failover.regain()
    await asyncio.sleep(0.45)
    await replica.failover.leave(replica.waiters.close(first))
    assert await _take(replica) == [1]
    await replica.failover.leave(replica.waiters.close(last))


async def test_joining_extends_the_deadline_in_redis(replica: Replica) -> None:
    """Nothing is asked again: the joined pair is claimed after the first caller's deadline."""
    await _ask(replica, [1], "a", "interactive", 0.2)
    await _ask(replica, [1], "b", "interactive")
    await asyncio.sleep(0.25)
    assert await _take(replica) == [1]


@pytest.mark.parametrize("path", ["poll", "failover", "return"])
async def test_pair_is_sent_for_the_others_when_the_best_caller_leaves(path: str, replica: Replica) -> None:
    """The interactive caller goes, on any path: the bulk caller is answered."""
    bulk = await _ask(replica, [1, 2], "b", "bulk")
    better = await _ask(replica, [2], "i", "interactive")
    if path != "poll":
        await _lose(replica)
    await replica.failover.leave(replica.waiters.close(better))
    if path == "poll":
        replica.place.flush()
        await replica.beat()
        await replica.queue.ask_again()
    if path == "return":
        await replica.failover.regain()
    assert sorted(await _take(replica)) == [1, 2]
    assert bulk.open


async def test_no_caller_waits_for_the_quota_of_one_that_joined(shared_redis: str) -> None:
    """After a flush, and without Redis, the pair goes out in whichever turn comes first."""
    quotas = Quotas({"slow": Quota("slow", pairs_per_second=0.001)})
    async with replicas(Place.new(shared_redis), bounds=BOUNDS, quotas=lambda: quotas) as (replica,):
        await _ask(replica, [1], "b", "bulk")
        await _ask(replica, [1], "slow", "interactive", 10**6)
        replica.place.flush()
        await replica.beat()
        await replica.queue.ask_again()
        await _lose(replica)
        replica.failover._local.begin_quotas()
        assert await _take(replica) == [1]


async def test_caller_that_is_refused_improves_no_priority(shared_redis: str) -> None:
    """A request that joins and is refused leaves the pair where it was, also when it is enqueued again."""
    async with replicas(Place.new(shared_redis), bounds=limits(batch_pairs=2, max_pairs=6)) as (replica,):
        await _ask(replica, list(range(6)), "b", "bulk")
        with pytest.raises(QueueFull):
            await _ask(replica, [9, 5], "i", "interactive")
        replica.place.flush()
        await replica.beat()
        await replica.queue.ask_again()
        assert 5 not in await _take(replica)


_turns = st.builds(Turn, st.sampled_from([None, "x", "y"]), st.sampled_from("ab"), st.sampled_from(LANES))


@given(turns=st.lists(_turns, min_size=1, max_size=12), shuffle=st.randoms(use_true_random=False))
def test_joining_keeps_the_best_priority_of_each_account_in_any_order(
    turns: list[Turn], shuffle: random.Random
) -> None:
    """Who came first changes nothing, and who comes twice neither."""

    def joined(order: list[Turn]) -> dict[str | None, str]:
        asked = WaitingPair(LAST, (order[0],), 0.0, b"")
        for turn in order[1:]:
            asked.join(turn)
        found = {turn.account: turn.priority for turn in asked.turns}
        assert len(found) == len(asked.turns)
        assert asked.priority == min(found.values(), key=LANES.index)
        return found

    expected: dict[str | None, str] = {}
    rank: Callable[[str], int] = LANES.index
    for turn in turns:
        expected[turn.account] = min(expected.get(turn.account, turn.priority), turn.priority, key=rank)
    again = turns * 2
    shuffle.shuffle(again)
    assert joined(turns) == joined(again) == expected
