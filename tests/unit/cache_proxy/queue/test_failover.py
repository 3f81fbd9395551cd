"""Tests of failover and return, with a Redis that is killed, paused and restarted.

More than 250 lines: all of them share the fixtures that lose and return Redis.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.cache_proxy.domain import Outcome
from services.cache_proxy.errors import ModelUnavailableError, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.failover import FailoverQueue
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.cache_proxy.queue.managed_queue import ManagedQueue, SharedQueueConfig, open_shared_queue
from services.cache_proxy.queue.waiters import Waiter, WaiterRegistry
from services.cache_proxy.redis_client.client_factory import create_client
from tests.support.redis_server import RedisServer, redis_process
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)

# They start and stop real servers, and run many examples.
pytestmark = pytest.mark.slow

BOUNDS = queue_limits(batch_pairs=4, calls_per_second=10)
LOST = StoreError("no answer")
DOWN = ModelUnavailableError("down", retry_after_seconds=1.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """Start a Redis for one test."""
    with redis_process(tmp_path) as running:
        yield running


class ReplicaWithDispatcher:
    """Replica as the proxy opens it, with a dispatcher and a model that answers 1 + number % 7."""

    def __init__(self, queue: ManagedQueue, waiters: WaiterRegistry) -> None:
        self.queue = queue
        self.sent_counts: Counter[int] = Counter()
        self._waiters = waiters

    async def dispatch(self) -> None:
        """Claim and answer batches as the dispatcher does, until cancelled."""
        while True:
            decision = await self.queue.claim()
            if isinstance(decision, Claim):
                self.sent_counts.update(pair_numbers(decision))
                await asyncio.sleep(0.02)
                outcomes: dict[bytes, Outcome] = {
                    item.digest: 1 + number % 7
                    for number, item in zip(pair_numbers(decision), decision.pairs, strict=True)
                }
                await self.queue.complete(decision, outcomes)
                continue
            try:
                async with asyncio.timeout(min(decision.wait_seconds, 60)):
                    await self.queue.wait_for_change()
            except TimeoutError:
                continue

    async def enqueue(self, numbers: list[int]) -> Waiter:
        """Enqueue pairs as the resolver does."""
        wanted = numbered_pairs(numbers)
        wait = self._waiters.register([item.digest for item in wanted])
        enqueued = await self.queue.enqueue(wanted, request_context())
        self._waiters.resolve_one(wait, enqueued.outcomes.items())
        return wait


@asynccontextmanager
async def _running_replicas(url: str, count: int) -> AsyncIterator[list[ReplicaWithDispatcher]]:
    place = QueueLocation.create(url)
    async with AsyncExitStack() as stack:
        opened = []
        for number in range(count):
            # A busy machine must not count as lost Redis.
            client = create_client(url, timeout_seconds=1.5)
            assert isinstance(client, Redis)
            stack.push_async_callback(client.aclose, close_connection_pool=True)
            shared = SharedQueueConfig(
                client=client,
                url=url,
                keys=place.keys,
                expected_replicas=count,
                lease_seconds=5,
                http_bound="127.0.0.1:1",
            )
            waiters = WaiterRegistry()
            queue = await stack.enter_async_context(
                open_shared_queue(
                    BOUNDS,
                    shared,
                    replica=f"{number:016x}",
                    on_outcome=waiters.resolve,
                    metrics=ProxyMetrics(CollectorRegistry()),
                )
            )
            proxy = ReplicaWithDispatcher(queue, waiters)
            task = asyncio.create_task(proxy.dispatch())
            stack.callback(task.cancel)
            opened.append(proxy)
        async with asyncio.timeout(30):
            while not all(_has_members(proxy.queue, count) for proxy in opened):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
        yield opened


def _has_members(queue: ManagedQueue, members: int) -> bool:
    """Return whether the replica knows of so many members with time slots."""
    assert isinstance(queue, FailoverQueue)
    membership = queue._limiter._membership
    return membership is not None and len(membership.members) == members


def _levels(wait: Waiter) -> dict[int, Outcome]:
    return {int.from_bytes(digest, "big"): level for digest, level in wait.outcomes.items()}


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_waiters_are_answered_while_redis_is_lost_and_after_its_return(
    how: str, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Each replica fails over and back without help and logs it once.

    Answers of the time without Redis are not inferred again.
    """
    caplog.set_level(logging.INFO, logger="services.cache_proxy.queue")
    async with _running_replicas(server.url, 2) as (one, other):
        first = await one.enqueue(list(range(40)))
        if how == "kill":
            server.kill()
        else:
            server.pause()
        second = await one.enqueue(list(range(30, 50)))
        third = await other.enqueue(list(range(100, 110)))
        async with asyncio.timeout(30):
            for wait in (first, second, third):
                await wait.wait()
        assert _levels(first) == {number: 1 + number % 7 for number in range(40)}
        # A pair is sent twice if Redis was lost while it was in a call.
        assert max(one.sent_counts.values()) <= 2
        lost = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(lost) == 2, [record.getMessage() for record in lost]
        sent = one.sent_counts + other.sent_counts
        if how == "kill":
            server.start()
        else:
            server.resume()
        async with asyncio.timeout(30):
            while sum("is back" in record.getMessage() for record in caplog.records) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            again = await other.enqueue([1, 2, 3, 40, 49])
            await again.wait()
            fresh = await other.enqueue(list(range(200, 220)))
            await fresh.wait()
        assert _levels(again) == {number: 1 + number % 7 for number in (1, 2, 3, 40, 49)}
        assert one.sent_counts + other.sent_counts - sent == Counter(range(200, 220))
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 2


async def test_repeated_loss_of_redis_under_load_answers_every_request(server: RedisServer) -> None:
    """Redis is lost three times under a steady stream of requests."""
    async with _running_replicas(server.url, 2) as both:
        waits = []
        for turn in range(3):
            for step in range(12):
                proxy = both[step % 2]
                start = 1000 * turn + 5 * step
                waits.append(await proxy.enqueue(list(range(start, start + 8))))
                if step == 4:
                    server.kill()
                if step == 8:
                    server.start()
                await asyncio.sleep(0.03)
        async with asyncio.timeout(60):
            for wait in waits:
                await wait.wait()
        for wait in waits:
            assert all(level == 1 + number % 7 for number, level in _levels(wait).items())


@pytest.fixture
async def replica(shared_redis: str) -> AsyncIterator[Replica]:
    """Open a replica whose loss and return of Redis a test triggers."""
    async with replicas(QueueLocation.create(shared_redis)) as (opened,):
        yield opened


async def _fail_over(replica: Replica) -> None:
    await replica.failover.fail_over(LOST)
    # The other replicas leave its slots free at once.
    replica.failover._limiter.not_before = 0.0


async def _enqueue(replica: Replica, numbers: list[int]) -> Waiter:
    wanted = numbered_pairs(numbers)
    wait = replica.waiters.register([item.digest for item in wanted])
    enqueued = await replica.failover.enqueue(wanted, request_context())
    replica.waiters.resolve_one(wait, enqueued.outcomes.items())
    return wait


async def _claim_batch(replica: Replica) -> Claim:
    for _ in range(100):
        claim = await replica.failover.claim()
        if isinstance(claim, Claim):
            return claim
        assert claim.wait_seconds < 1
        await asyncio.sleep(claim.wait_seconds)
    raise AssertionError("no batch")


async def _assert_nothing_left(replica: Replica) -> None:
    assert replica.location.leftover_keys() == {}
    assert replica.queue.interest.snapshot() == {}
    assert replica.queue.claims.ids == []
    assert replica.failover._local._entries == {}
    assert not replica.failover._local_claims


@pytest.mark.parametrize("how", ["fail", "refuse", "put back"])
async def test_local_claim_that_ends_unanswered_after_return_waits_in_redis(
    how: str, replica: Replica
) -> None:
    """Its pairs wait in Redis once, and are answered."""
    await _fail_over(replica)
    wait = await _enqueue(replica, [1, 2, 3])
    claim = await _claim_batch(replica)
    await replica.failover.fail_back()
    assert not isinstance(await replica.failover.claim(), Claim), "sent twice"
    if how == "fail":
        await replica.failover.fail(claim, DOWN, retry_after_seconds=0)
    elif how == "refuse":
        await replica.failover.reject(claim, DOWN, {})
    else:
        await replica.failover.release(claim)
    claim = await _claim_batch(replica)
    await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs})
    assert sorted(_levels(wait)) == [1, 2, 3]
    await _assert_nothing_left(replica)


@pytest.mark.parametrize("how", ["fulfil", "fail", "put back", "in part"])
async def test_shared_claim_that_ends_after_loss_is_resolved_or_requeued_locally(
    how: str, replica: Replica
) -> None:
    """Waiting requests get the outcomes, and pairs without one wait in the local queue."""
    wait = await _enqueue(replica, [1, 2, 3])
    claim = await _claim_batch(replica)
    await _fail_over(replica)
    assert not isinstance(await replica.failover.claim(), Claim), "sent twice"
    done: dict[bytes, Outcome] = {item.digest: 2 for item in claim.pairs}
    if how == "in part":
        await replica.failover.complete(claim, {claim.pairs[0].digest: 2})
        await replica.failover.release(claim)
    elif how == "fail":
        await replica.failover.fail(claim, DOWN, retry_after_seconds=0)
    elif how == "put back":
        await replica.failover.release(claim)
    else:
        await replica.failover.complete(claim, done)
    if how != "fulfil":
        claim = await _claim_batch(replica)
        assert len(claim.pairs) == (2 if how == "in part" else 3)
        await replica.failover.complete(claim, done)
    assert not wait.pending
    replica.location.age_claims(60_000)
    await replica.failover.fail_back()
    await replica.heartbeat()
    assert not isinstance(await replica.failover.claim(), Claim), "sent twice"
    await _assert_nothing_left(replica)


async def test_pairs_enqueued_during_return_wait_in_redis(replica: Replica) -> None:
    """A pair that arrives between two steps of the return is neither lost nor left in the local queue."""
    await _fail_over(replica)
    waits = [await _enqueue(replica, [1])]
    returning = asyncio.create_task(replica.failover.fail_back())
    number = 2
    while not returning.done():
        waits.append(await _enqueue(replica, [number]))
        number += 1
        await asyncio.sleep(0)
    await returning
    assert replica.failover._local._entries == {}
    while any(wait.pending for wait in waits):
        claim = await _claim_batch(replica)
        await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs})
    await _assert_nothing_left(replica)


async def test_no_local_claim_during_return(replica: Replica) -> None:
    """Since the heartbeat, the other replicas use this one's time slots.

    Pairs that arrive during the return wait.
    """
    await replica.heartbeat()
    await _fail_over(replica)
    waits = [await _enqueue(replica, [1])]
    # Delays of the heartbeat and of the scripts that follow it.
    replica.client.delays = (0.0, 0.1)
    returning = asyncio.create_task(replica.session._heartbeat())
    await asyncio.sleep(0.05)
    waits.append(await _enqueue(replica, [2]))
    assert not isinstance(await replica.failover.claim(), Claim)
    await returning
    while any(wait.pending for wait in waits):
        claim = await _claim_batch(replica)
        await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs})
    await _assert_nothing_left(replica)


async def test_no_local_claim_while_invalidation_log_is_read(replica: Replica) -> None:
    """Reading the log may take long, and other replicas use this one's slots since the heartbeat."""
    decisions: list[Claim | ClaimDeferred] = []

    async def record_claims(_last: bytes | None) -> None:
        for _ in range(30):
            decisions.append(await replica.failover.claim())
            await asyncio.sleep(0.01)

    await replica.heartbeat()
    await _fail_over(replica)
    wait = await _enqueue(replica, [1])
    # From then on it may use its time slots.
    await asyncio.sleep(replica.failover._limiter.not_before - time.monotonic())
    replica.session._log_callbacks = {replica.location.keys.invalidation_log: record_claims}
    await replica.session._heartbeat()
    assert decisions
    assert not [decision for decision in decisions if isinstance(decision, Claim)]
    claim = await _claim_batch(replica)
    await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs})
    assert not wait.pending


async def test_repeatedly_failing_return_keeps_time_slots(replica: Replica) -> None:
    """Heartbeats succeed, other scripts fail.

    The replica is silent after each attempt, and calls the model meanwhile.
    """
    replica.client.max_command_bytes = 2000
    wait = await _enqueue(replica, list(range(100)))
    beating = asyncio.create_task(replica.session._heartbeat_loop())
    async with asyncio.timeout(5):
        while wait.pending:
            claim = await replica.failover.claim()
            if isinstance(claim, Claim):
                await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs})
            else:
                await asyncio.sleep(min(claim.wait_seconds, 0.1))
    replica.client.max_command_bytes = 10**9
    beating.cancel()
    assert replica.failover.is_redis_lost


async def test_pushback_holds_after_loss_of_redis(replica: Replica) -> None:
    """The model's pushback holds for the local queue, too."""
    await replica.heartbeat()
    wait = await _enqueue(replica, [1])
    await replica.failover.fail(await _claim_batch(replica), DOWN, retry_after_seconds=5)
    await _fail_over(replica)
    decision = await replica.failover.claim()
    assert isinstance(decision, ClaimDeferred)
    assert decision.wait_seconds > 4
    await replica.failover.cancel(replica.waiters.unregister(wait))


async def test_pair_requested_again_after_cancel_survives_failover(replica: Replica) -> None:
    """A cancelled pair in a call is requested again after the return.

    Then Redis is lost again, and its call fails.
    """
    await _fail_over(replica)
    left = await _enqueue(replica, [1])
    claim = await _claim_batch(replica)
    await replica.failover.cancel(replica.waiters.unregister(left))
    await replica.failover.fail_back()
    wait = await _enqueue(replica, [1])
    await _fail_over(replica)
    await replica.failover.fail(claim, DOWN, retry_after_seconds=0)
    claim = await _claim_batch(replica)
    await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs})
    assert not wait.pending


async def test_pair_that_ended_locally_is_not_enqueued_on_return(replica: Replica) -> None:
    """Whether it was rejected, failed or known already."""
    await _fail_over(replica)
    waits = [await _enqueue(replica, [1])]
    for _ in range(4):
        await replica.failover.fail(await _claim_batch(replica), DOWN, retry_after_seconds=0)
    waits.append(await _enqueue(replica, [2]))
    claim = await _claim_batch(replica)
    await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs})
    waits.append(await _enqueue(replica, [2]))
    assert all(not wait.pending for wait in waits)
    assert replica.queue.interest.snapshot() == {}
    await replica.failover.fail_back()
    await _assert_nothing_left(replica)


async def test_answers_given_without_redis_are_published_on_return(shared_redis: str) -> None:
    """Another replica that waits for the same pair gets the answer, and so do later requests."""
    async with replicas(QueueLocation.create(shared_redis), 2) as (alone, other):
        wait, _ = await other.enqueue(numbered_pairs([1]))
        await _fail_over(alone)
        await _enqueue(alone, [1, 2])
        claim = await _claim_batch(alone)
        await alone.failover.complete(claim, {item.digest: 4 for item in claim.pairs})
        await alone.failover.fail_back()
        await other.receive_messages()
        assert list(wait.outcomes.values()) == [4]
        later, _ = await other.enqueue(numbered_pairs([2]))
        assert list(later.outcomes.values()) == [4]
        assert other.location.leftover_keys() == {}


async def test_request_cancelled_while_redis_is_lost_is_not_enqueued_on_return(replica: Replica) -> None:
    """Its pair was enqueued in Redis before the loss."""
    wait = await _enqueue(replica, [1])
    await _fail_over(replica)
    await replica.failover.cancel(replica.waiters.unregister(wait))
    assert not isinstance(await replica.failover.claim(), Claim)
    await replica.failover.fail_back()
    assert replica.queue.interest.snapshot() == {}


async def test_local_claim_that_ends_in_parts_is_forgotten(replica: Replica) -> None:
    """A part of its pairs was found in the cache before the call."""
    await _fail_over(replica)
    wait = await _enqueue(replica, [1, 2, 3])
    claim = await _claim_batch(replica)
    await replica.failover.complete(claim, {claim.pairs[0].digest: 2})
    assert claim in replica.failover._local_claims
    await replica.failover.complete(claim, {item.digest: 2 for item in claim.pairs[1:]})
    assert not wait.pending
    await _assert_nothing_left(replica)
