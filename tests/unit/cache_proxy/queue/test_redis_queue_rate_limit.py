"""Tests of the rate limit on Redis's clock, as the claims of real scripts consume it.

More than 250 lines: all of them judge the same state of the limit.
"""

import asyncio
import math
import time
from itertools import pairwise

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache_proxy.domain import PACE
from services.cache_proxy.errors import PairRejectedError
from services.cache_proxy.queue.interface import Claim, ClaimDeferred, QueueLimits
from services.cache_proxy.queue.managed_queue import _publish_limits
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

SLACK_SECONDS = 0.003


async def _slots(
    replica: Replica, *, seconds: float, sizes: list[int], put_back: frozenset[int] = frozenset()
) -> list[tuple[float, int]]:
    """Claim as a dispatcher does; return the slots of batches that were not released, and their pairs."""
    clock = replica.location.client()
    numbers = iter(range(10**6))
    taken: list[tuple[float, int]] = []
    until = time.monotonic() + seconds
    claims = 0
    while time.monotonic() < until:
        size = sizes[claims % len(sizes)]
        await replica.enqueue(numbered_pairs([next(numbers) for _ in range(size)]))
        decision = await replica.queue.claim()
        if isinstance(decision, ClaimDeferred):
            await asyncio.sleep(min(decision.wait_seconds, 0.1))
            continue
        claims += 1
        if claims in put_back:
            await replica.queue.release(decision)
            continue
        spent, calls = clock.hmget(f"{replica.location.keys.limit}", "pairs_tat", "calls_tat")
        assert spent
        assert calls
        slot = float(calls) - 1000 / (replica.limits.calls_per_second * PACE)
        assert float(spent) >= slot
        taken.append((slot / 1000, len(decision.pairs)))
        await replica.queue.complete(decision, {item.digest: 1 for item in decision.pairs})
    clock.close()
    return taken


def _assert_within_limit(taken: list[tuple[float, int]], bounds: QueueLimits) -> None:
    """Assert at most `calls * T + 1` calls and `rate * T + batch` pairs in each window T."""
    for first in range(len(taken)):
        pairs_sent = 0
        for last in range(first, len(taken)):
            window = taken[last][0] - taken[first][0] + SLACK_SECONDS
            pairs_sent += taken[last][1]
            assert last - first + 1 <= bounds.calls_per_second * PACE * window + 1 + 1e-6
            assert pairs_sent <= bounds.pairs_per_second * PACE * window + bounds.batch_pairs + 1e-6


@settings(max_examples=6)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    put_back=st.frozensets(st.integers(1, 30), max_size=6),
    pairs_per_second=st.sampled_from([100, 400, 2000]),
)
def test_no_window_is_above_the_limit(
    sizes: list[int], put_back: frozenset[int], pairs_per_second: float, shared_redis: str
) -> None:
    """At 50 calls a second, whatever the sizes of batches, and whichever are released."""
    bounds = queue_limits(batch_pairs=8, calls_per_second=50, pairs_per_second=pairs_per_second)

    async def run() -> None:
        async with replicas(QueueLocation.create(shared_redis), 1, bounds) as (replica,):
            taken = await _slots(replica, seconds=0.7, sizes=sizes, put_back=put_back)
            _assert_within_limit(taken, bounds)

    asyncio.run(run())


async def test_backlog_uses_the_whole_rate(shared_redis: str) -> None:
    """With two replicas, no slot is later than the limit or the claiming replica made it."""
    bounds = queue_limits(batch_pairs=8, calls_per_second=20)
    async with replicas(QueueLocation.create(shared_redis), 2, bounds) as both:
        for replica in both:
            await replica.enqueue(numbered_pairs(range(2000)))
        # For each claim: when it was requested, when it was granted, and for when.
        slots: list[tuple[float, float, float]] = []

        async def dispatch(replica: Replica) -> None:
            while len(slots) < 31:
                requested_at = time.monotonic()
                decision = await replica.queue.claim()
                if isinstance(decision, Claim):
                    slots.append((requested_at, time.monotonic(), decision.send_at))
                    await replica.queue.complete(decision, {item.digest: 1 for item in decision.pairs})
                else:
                    await asyncio.sleep(decision.wait_seconds)

        async def beat() -> None:
            while True:
                await asyncio.gather(*(replica.heartbeat() for replica in both))
                await asyncio.sleep(0.2)

        beating = asyncio.create_task(beat())
        await asyncio.gather(*map(dispatch, both))
        beating.cancel()
        slots.sort(key=lambda slot: slot[2])
        apart, gaps = 1 / (20 * PACE), 0
        for (before, after, earlier), (requested_at, claimed_at, later) in pairwise(slots):
            # Redis's clock is known to a round trip, and counts whole milliseconds.
            unsure = after - before + claimed_at - requested_at + 0.003
            assert later - earlier >= apart - unsure
            # Claimed in time, it follows at once; claimed late, it begins a moment after (`LEAD_MS`).
            gaps += later > max(earlier + apart, claimed_at) + 0.017 + unsure
        # A few gaps come from a machine that stood still. A fault would lose more than these.
        assert gaps <= 3


async def _claim_wait_seconds(replica: Replica) -> float:
    decision = await replica.queue.claim()
    assert isinstance(decision, ClaimDeferred)
    return decision.wait_seconds


@pytest.mark.parametrize("lost", ["all", "run", "nonsense", "far"])
async def test_lost_limit_state_counts_as_spent(lost: str, shared_redis: str) -> None:
    """After a flush, with another server's id, or with values that are invalid or far ahead: one interval."""
    bounds = queue_limits(calls_per_second=0.5)
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, bounds) as (replica,):
        await replica.enqueue(numbered_pairs([1]))
        with place.client() as client:
            await replica.queue.claim()
            # The whole limit is free.
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            if lost == "all":
                place.flush()
                await replica.queue.re_enqueue()
            elif lost == "run":
                client.hset(place.keys.limit, "run", "0" * 40)
            else:
                value = {"nonsense": "x", "far": 10**15}[lost]
                client.hset(place.keys.limit, mapping={"pairs_tat": value, "calls_tat": value})
        assert 1.9 <= await _claim_wait_seconds(replica) <= 2 / PACE


@pytest.mark.parametrize("far", ["pairs_tat", "calls_tat", "not_before", "backoff_until"])
async def test_limit_state_far_ahead_rejects_no_request(far: str, shared_redis: str) -> None:
    """A wrong clock may have written it. Requests are admitted, so that the next claim corrects it."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, queue_limits(calls_per_second=10)) as (replica,):
        with place.client() as client:
            key = place.keys.model if far == "backoff_until" else place.keys.limit
            client.hset(key, mapping={far: (time.time() + 86_400) * 1000, "failures": 9})
        _, enqueued = await replica.enqueue(numbered_pairs([1]))
        assert enqueued.queued
        assert pair_numbers(await replica.claim_batch()) == [1]


async def test_idle_limit_allows_a_call_at_once(shared_redis: str) -> None:
    """A single pair goes at once after an idle interval, and the next one after another interval."""
    bounds = queue_limits(calls_per_second=0.5)
    async with replicas(QueueLocation.create(shared_redis), 1, bounds) as (replica,):
        await replica.enqueue(numbered_pairs([1]))
        assert 0 < await _claim_wait_seconds(replica) <= 2 / PACE
        claim = await replica.claim_batch()
        await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        await replica.enqueue(numbered_pairs([2]))
        assert 1 < await _claim_wait_seconds(replica) <= 2 / PACE + 0.015


async def test_new_server_allows_no_call_at_first(shared_redis: str) -> None:
    """The server before may still serve others.

    No call is made until both sides take each other for silent.
    """
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, queue_limits(calls_per_second=100)) as (replica,):
        await replica.enqueue(numbered_pairs([1]))
        await replica.queue.complete(
            claim := await replica.claim_batch(), {item.digest: 1 for item in claim.pairs}
        )
        await replica.enqueue(numbered_pairs([2]))
        with place.client() as client:
            client.hset(place.keys.limit, "run", "0" * 40)
        assert 1.0 < await _claim_wait_seconds(replica) <= 1.2
        assert pair_numbers(await replica.claim_batch()) == [2]


async def test_replica_from_another_server_counts_as_just_called(shared_redis: str) -> None:
    """It gets no call before its heartbeat arrives, and then all replicas wait for an interval."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, queue_limits(calls_per_second=2)) as (comes, other):
        await comes.enqueue(numbered_pairs([1]))
        await other.enqueue(numbered_pairs([1]))
        with place.client() as client:
            await _claim_wait_seconds(other)
            # The whole limit is free.
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            comes.queue.claims.server_run_id = "0" * 40
            assert await _claim_wait_seconds(comes) < 0.25
            assert client.hget(place.keys.limit, "calls_tat") == b"1"
            await comes.heartbeat()
        for replica in (comes, other):
            assert 0.4 < await _claim_wait_seconds(replica) <= 0.5 / PACE


async def test_only_last_claim_returns_its_slot(shared_redis: str) -> None:
    """A slot that is released at once is free, but not after another claim, a reset or lost Redis."""
    bounds = queue_limits(batch_pairs=2, calls_per_second=4)
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, bounds) as (replica,):
        with place.client() as client:

            def calls_tat() -> float:
                return float(client.hget(place.keys.limit, "calls_tat") or 0)

            await replica.enqueue(numbered_pairs(range(20)))
            first = await replica.claim_batch()
            spent = calls_tat()
            await replica.queue.release(first)
            assert calls_tat() < spent - 200
            # Repeated, the release has no effect.
            await replica.queue.release(first)
            assert calls_tat() < spent - 200
            second, third = await replica.claim_batch(), await replica.claim_batch()
            spent = calls_tat()
            await replica.queue.release(second)
            assert calls_tat() == spent
            client.hset(place.keys.limit, "run", "0" * 40)
            await replica.queue.claim()
            spent = calls_tat()
            await replica.queue.release(third)
            assert calls_tat() == spent
            fourth = await replica.claim_batch()
            # A heartbeat of a replica that had lost Redis.
            heartbeat = [replica.name, b"\x90", "", 1, 0, 4, 2, b"\x90", ""]
            await replica.scripts.run("heartbeat", heartbeat)
            spent = calls_tat()
            await replica.queue.release(fourth)
            assert calls_tat() == spent


async def test_batch_found_in_cache_returns_its_slot(shared_redis: str) -> None:
    """Other replicas answered all of it before it was sent."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, queue_limits(calls_per_second=1)) as (replica,):
        with place.client() as client:
            await replica.enqueue(numbered_pairs([1]))
            claim = await replica.claim_batch()
            spent = float(client.hget(place.keys.limit, "calls_tat") or 0)
            await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
            await replica.queue.release(claim)
            assert float(client.hget(place.keys.limit, "calls_tat") or 0) < spent - 900


async def test_two_model_versions_share_one_limit_and_no_answers(shared_redis: str) -> None:
    """The same pair is inferred in both namespaces."""
    bounds = queue_limits(calls_per_second=0.5)
    place = QueueLocation.create(shared_redis)
    async with (
        replicas(place, 1, bounds) as (one,),
        replicas(place.with_namespace("m"), 1, bounds) as (other,),
    ):
        await one.enqueue(numbered_pairs([1]))
        await other.enqueue(numbered_pairs([1]))
        claim = await one.claim_batch()
        assert await _claim_wait_seconds(other) > 1
        await one.queue.complete(claim, {item.digest: 5 for item in claim.pairs})
        assert not other.resolved
        await one.heartbeat()
        claim = await other.claim_batch()
        await other.queue.complete(claim, {item.digest: 6 for item in claim.pairs})
        assert [level for _, level in other.resolved] == [6]


async def test_last_started_replica_sets_limit(shared_redis: str, caplog: pytest.LogCaptureFixture) -> None:
    """It replaces the limit of all and logs it once. After a flush the limit is kept."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, queue_limits(calls_per_second=1)) as (old,):
        await _publish_limits(old.scripts, old.limits, old.metrics)
        assert not caplog.records
        await _publish_limits(old.scripts, queue_limits(calls_per_second=0.1), old.metrics)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        await old.heartbeat()
        await old.enqueue(numbered_pairs([1]))
        with place.client() as client:
            client.hdel(place.keys.limit, "run")
            assert 9.9 < await _claim_wait_seconds(old) <= 10 / PACE
            place.flush()
            await old.heartbeat()
            assert client.hget(place.keys.limit, "calls_per_second") == str(1 * PACE).encode()


async def test_last_started_replica_sets_batch_size(shared_redis: str) -> None:
    """A replica with another size sends no larger batch, and a full batch counts as a full one."""
    rate = 10
    place = QueueLocation.create(shared_redis)
    big = queue_limits(batch_pairs=20, pairs_per_second=rate)
    small = queue_limits(batch_pairs=2, pairs_per_second=rate)
    async with replicas(place, 1, small) as (old,), replicas(place, 1, big, first_number=2) as (new,):
        await _publish_limits(new.scripts, big, new.metrics)
        with place.client() as client:
            await new.enqueue(numbered_pairs(range(20)))
            await new.queue.claim()
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            assert len((await new.claim_batch()).pairs) == 20
            await old.enqueue(numbered_pairs(range(100, 120)))
            assert await _claim_wait_seconds(old) > 1.9
            await _publish_limits(old.scripts, small, old.metrics)
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            await new.enqueue(numbered_pairs(range(100, 120)))
            assert len((await new.claim_batch()).pairs) == 2


@pytest.mark.parametrize("calls", [0, 5])
async def test_probes_keep_to_the_limit_in_pairs(calls: float, shared_redis: str) -> None:
    """Half of a rejected batch consumes the limit as any pairs do."""
    bounds = queue_limits(batch_pairs=100, pairs_per_second=50, calls_per_second=calls)
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, bounds) as (replica,):
        await replica.enqueue(numbered_pairs(range(100)))
        with place.client() as client:
            await replica.queue.claim()
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            begun_at = time.monotonic()
            claim = await replica.claim_batch()
            await replica.queue.reject(claim, _refused(), {})
            assert await _claim_wait_seconds(replica) + time.monotonic() - begun_at > 1


def _refused() -> PairRejectedError:
    return PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad")


async def test_nothing_is_paced_without_a_limit(shared_redis: str) -> None:
    """With rates of 0, each batch may be sent at once."""
    async with replicas(QueueLocation.create(shared_redis), 1, queue_limits(batch_pairs=2)) as (replica,):
        await replica.enqueue(numbered_pairs(range(40)), request_context())
        for _ in range(20):
            claim = await replica.queue.claim()
            assert isinstance(claim, Claim)
            assert claim.send_at <= time.monotonic()
        assert await replica.queue.claim() == ClaimDeferred(math.inf)
