"""Tests of pairs for which several requests wait: the best priority and the latest deadline count.

More than 250 lines: all of them share the steps of a request that joins.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.domain import PRIORITY_CLASSES
from services.cache_proxy.errors import ModelUnavailableError, PairRejectedError, QueueFullError, StoreError
from services.cache_proxy.queue.interface import Claim
from services.cache_proxy.queue.quotas import Quota, Quotas
from services.cache_proxy.queue.redis_queue import RedisQueue
from services.cache_proxy.queue.waiters import Waiter
from services.cache_proxy.queue.waiting_pairs import Requester, WaitingPair
from tests.support.queue_subjects import QueueFactory
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pair,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)

BOUNDS = queue_limits(batch_pairs=2)
LOST = StoreError("no answer")
DOWN = ModelUnavailableError("down", retry_after_seconds=1.0)
REFUSED = PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad")
LAST = numbered_pair(5)
WORSE = pytest.mark.parametrize("worse", ["bulk", "refresh"])


@pytest.fixture
async def replica(shared_redis: str) -> AsyncIterator[Replica]:
    """Open a replica whose loss and return of Redis a test triggers."""
    async with replicas(QueueLocation.create(shared_redis), bounds=BOUNDS) as (opened,):
        await opened.heartbeat()
        yield opened


async def _enqueue(
    replica: Replica, numbers: list[int], caller: str, priority: str, patience: float = 60
) -> Waiter:
    wait = replica.waiters.register([item.digest for item in numbered_pairs(numbers)])
    enqueued = await replica.failover.enqueue(
        numbered_pairs(numbers), request_context(caller, priority, timeout=patience)
    )
    replica.waiters.resolve_one(wait, enqueued.outcomes.items())
    return wait


async def _claim_batch(replica: Replica) -> list[int]:
    for _ in range(200):
        decision = await replica.failover.claim()
        if isinstance(decision, Claim):
            return pair_numbers(decision)
        assert decision.wait_seconds < 5, decision
        await asyncio.sleep(decision.wait_seconds)
    raise AssertionError("no batch")


async def _fail_over(replica: Replica) -> None:
    await replica.failover.fail_over(LOST)
    replica.failover._limiter.not_before = 0.0


@WORSE
@pytest.mark.parametrize("how", ["fail", "put back", "refuse"])
async def test_pair_joined_in_a_call_waits_again_with_the_best_priority(
    how: str, worse: str, opened: QueueFactory
) -> None:
    """Its batch ends without an answer."""
    async with opened(BOUNDS) as subject:
        await subject.enqueue([numbered_pair(8), numbered_pair(9)], request_context("b", worse))
        claim = await subject.claim_batch()
        await subject.enqueue([numbered_pair(9)], request_context("i", "interactive"))
        if how == "fail":
            await subject.queue.fail(claim, DOWN, retry_after_seconds=0)
        elif how == "put back":
            await subject.queue.release(claim)
        else:
            # The named pair ends, and the other one waits again.
            await subject.queue.reject(claim, REFUSED, {numbered_pair(8).digest: REFUSED})
        if isinstance(subject.queue, RedisQueue):
            subject.queue.claims.deferral.not_before = 0.0
        await subject.enqueue(numbered_pairs(range(4)), request_context("c", "interactive"))
        assert 9 in pair_numbers(await subject.claim_batch())


@WORSE
async def test_suspect_joined_with_better_priority_waits_again_with_it(
    worse: str, opened: QueueFactory
) -> None:
    """The other half is rejected, so the pair is presumed valid."""
    async with opened(BOUNDS) as subject:
        await subject.enqueue([numbered_pair(8), numbered_pair(9)], request_context("b", worse))
        await subject.queue.reject(await subject.claim_batch(), REFUSED, {})
        await subject.enqueue([numbered_pair(9)], request_context("i", "interactive"))
        probe = await subject.claim_batch()
        assert pair_numbers(probe) == [8]
        await subject.enqueue(numbered_pairs(range(4)), request_context("c", "interactive"))
        await subject.queue.reject(probe, REFUSED, {})
        assert 9 in pair_numbers(await subject.claim_batch())


@WORSE
async def test_re_enqueue_after_flush_uses_best_priority(worse: str, replica: Replica) -> None:
    """The pair that an interactive request joined is in the next batch."""
    await _enqueue(replica, list(range(6)), "b", worse)
    await _enqueue(replica, [5], "i", "interactive")
    replica.location.flush()
    await replica.heartbeat()
    await replica.queue.re_enqueue()
    assert 5 in await _claim_batch(replica)


@WORSE
async def test_local_queue_takes_over_the_best_priority(worse: str, replica: Replica) -> None:
    """The joined pair is in the first batch without Redis."""
    await _enqueue(replica, list(range(6)), "b", worse)
    await _enqueue(replica, [5], "i", "interactive")
    await _fail_over(replica)
    assert 5 in await _claim_batch(replica)


@WORSE
@pytest.mark.parametrize("flushed", [False, True])
async def test_return_to_redis_keeps_the_best_priority(flushed: bool, worse: str, replica: Replica) -> None:
    """A pair that was joined while Redis was lost is in the first batch after the return."""
    await _enqueue(replica, list(range(6)), "b", worse)
    await _fail_over(replica)
    await _enqueue(replica, [5], "i", "interactive")
    if flushed:
        replica.location.flush()
        await replica.heartbeat()
    await replica.failover.fail_back()
    assert 5 in await _claim_batch(replica)


@WORSE
async def test_pair_joined_during_the_return_keeps_the_best_priority(worse: str, replica: Replica) -> None:
    """It was being enqueued with its first request's priority when the better one came."""
    await _enqueue(replica, list(range(6)), "b", worse)
    await _fail_over(replica)
    replica.client.delays = (0.1,)
    returning = asyncio.create_task(replica.failover.fail_back())
    await asyncio.sleep(0.03)
    await _enqueue(replica, [5], "i", "interactive")
    await returning
    assert 5 in await _claim_batch(replica)


async def test_pair_cancelled_and_requested_again_during_return_waits_in_redis(replica: Replica) -> None:
    """Its first request was cancelled while it was enqueued.

    The second round of the return enqueues it again.
    """
    first = await _enqueue(replica, [1], "a", "interactive")
    await _fail_over(replica)
    # Delays of the enqueue and of the cancellation that follows it.
    replica.client.delays = (0.1, 0.1)
    returning = asyncio.create_task(replica.failover.fail_back())
    await asyncio.sleep(0.03)
    await replica.failover.cancel(replica.waiters.unregister(first))
    await asyncio.sleep(0.12)
    await _enqueue(replica, [1], "a", "interactive")
    await returning
    assert await _claim_batch(replica) == [1]


@pytest.mark.parametrize("path", ["poll", "failover", "return"])
async def test_latest_deadline_counts_after_the_first_has_passed(path: str, replica: Replica) -> None:
    """The first request has ended, and the pair is still sent for the second."""
    first = await _enqueue(replica, [1], "a", "interactive", 0.4)
    if path == "return":
        await _fail_over(replica)
    last = await _enqueue(replica, [1], "b", "bulk")
    if path == "failover":
        await _fail_over(replica)
    if path == "poll":
        replica.location.flush()
        await replica.heartbeat()
        await replica.queue.re_enqueue()
    if path == "return":
        await replica.failover.fail_back()
    await asyncio.sleep(0.45)
    await replica.failover.cancel(replica.waiters.unregister(first))
    assert await _claim_batch(replica) == [1]
    await replica.failover.cancel(replica.waiters.unregister(last))


async def test_joining_extends_the_deadline_in_redis(replica: Replica) -> None:
    """The joined pair is claimed after the first request's deadline, without a repeated enqueue."""
    await _enqueue(replica, [1], "a", "interactive", 0.2)
    await _enqueue(replica, [1], "b", "interactive")
    await asyncio.sleep(0.25)
    assert await _claim_batch(replica) == [1]


@pytest.mark.parametrize("path", ["poll", "failover", "return"])
async def test_pair_is_sent_after_request_with_best_priority_is_cancelled(
    path: str, replica: Replica
) -> None:
    """The bulk request is answered, with and without Redis."""
    bulk = await _enqueue(replica, [1, 2], "b", "bulk")
    better = await _enqueue(replica, [2], "i", "interactive")
    if path != "poll":
        await _fail_over(replica)
    await replica.failover.cancel(replica.waiters.unregister(better))
    if path == "poll":
        replica.location.flush()
        await replica.heartbeat()
        await replica.queue.re_enqueue()
    if path == "return":
        await replica.failover.fail_back()
    assert sorted(await _claim_batch(replica)) == [1, 2]
    assert bulk.pending


async def test_pair_does_not_wait_for_quota_of_joined_request(shared_redis: str) -> None:
    """After a flush, and without Redis, the pair goes with the requester whose turn comes first."""
    quotas = Quotas({"slow": Quota("slow", pairs_per_second=0.001)})
    async with replicas(QueueLocation.create(shared_redis), bounds=BOUNDS, quotas=lambda: quotas) as (
        replica,
    ):
        await _enqueue(replica, [1], "b", "bulk")
        await _enqueue(replica, [1], "slow", "interactive", 10**6)
        replica.location.flush()
        await replica.heartbeat()
        await replica.queue.re_enqueue()
        await _fail_over(replica)
        replica.failover._local.reset_quotas()
        assert await _claim_batch(replica) == [1]


async def test_rejected_request_does_not_improve_priority(shared_redis: str) -> None:
    """The pair keeps its priority, also when it is enqueued again."""
    async with replicas(
        QueueLocation.create(shared_redis), bounds=queue_limits(batch_pairs=2, max_pairs=6)
    ) as (replica,):
        await _enqueue(replica, list(range(6)), "b", "bulk")
        with pytest.raises(QueueFullError):
            await _enqueue(replica, [9, 5], "i", "interactive")
        replica.location.flush()
        await replica.heartbeat()
        await replica.queue.re_enqueue()
        assert 5 not in await _claim_batch(replica)


_turns = st.builds(
    Requester, st.sampled_from([None, "x", "y"]), st.sampled_from("ab"), st.sampled_from(PRIORITY_CLASSES)
)


@given(turns=st.lists(_turns, min_size=1, max_size=12), shuffle=st.randoms(use_true_random=False))
def test_joining_keeps_the_best_priority_of_each_account_in_any_order(
    turns: list[Requester], shuffle: random.Random
) -> None:
    """Neither order nor repetition of requests matters."""

    def joined(order: list[Requester]) -> dict[str | None, str]:
        waiting = WaitingPair(LAST, (order[0],), 0.0, b"")
        for turn in order[1:]:
            waiting.add_requester(turn)
        found = {turn.account: turn.priority for turn in waiting.requesters}
        assert len(found) == len(waiting.requesters)
        assert waiting.priority == min(found.values(), key=PRIORITY_CLASSES.index)
        return found

    expected: dict[str | None, str] = {}
    rank: Callable[[str], int] = PRIORITY_CLASSES.index
    for turn in turns:
        expected[turn.account] = min(expected.get(turn.account, turn.priority), turn.priority, key=rank)
    again = turns * 2
    shuffle.shuffle(again)
    assert joined(turns) == joined(again) == expected
