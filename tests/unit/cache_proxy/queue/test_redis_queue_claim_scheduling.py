"""Tests of which replica of the shared queue claims next, and when it is woken."""

import asyncio

import pytest

from services.cache_proxy.errors import (
    ModelUnavailableError,
)
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from tests.support.replicas import (
    QueueLocation,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)

DOWN = ModelUnavailableError("down", retry_after_seconds=1.0)


@pytest.fixture
def place(shared_redis: str) -> QueueLocation:
    """Return a new deployment."""
    return QueueLocation.create(shared_redis)


async def test_replica_with_failed_call_leaves_next_slot_to_another(
    place: QueueLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits a little longer than its backoff, and a replica with no waiting pairs is woken."""
    # This is longer than a slow test takes.
    monkeypatch.setattr("services.cache_proxy.queue.call_deferral._CLAIM_DELAY_AFTER_FAILURE_SECONDS", 60)
    async with replicas(place, 2) as (broken, sound):
        await broken.enqueue(numbered_pairs([1]))
        await sound.enqueue(numbered_pairs([1]))
        claim = await broken.claim_batch()
        await sound.receive_messages()
        sound.queue._changed.clear()
        assert not isinstance(await sound.queue.claim(), Claim)
        await broken.queue.fail(claim, DOWN, retry_after_seconds=0)
        await sound.receive_messages()
        await asyncio.wait_for(sound.queue.wait_for_change(), 30)
        assert isinstance(await broken.queue.claim(), ClaimDeferred)
        assert pair_numbers(await sound.claim_batch()) == [1]


async def test_assisting_replica_claims_when_next_slot_is_far_away(
    place: QueueLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It claims for another replica whose call failed."""
    monkeypatch.setattr("services.cache_proxy.queue.claims._ASSIST_SECONDS", 0.05)
    monkeypatch.setattr("services.cache_proxy.queue.call_deferral._CLAIM_DELAY_AFTER_FAILURE_SECONDS", 60)
    async with replicas(place, 2, queue_limits(calls_per_second=3)) as (broken, sound):
        await broken.enqueue(numbered_pairs([1]))
        claim = await broken.claim_batch()
        await broken.queue.fail(claim, DOWN)
        await sound.receive_messages()
        assert pair_numbers(await sound.claim_batch()) == [1]


async def test_replica_with_failed_call_leaves_slot_of_slow_limit_to_others(
    place: QueueLocation,
) -> None:
    """Its backoff may end before the limit allows a call. It waits until another could have taken that."""
    bounds = queue_limits(calls_per_second=0.01)
    async with replicas(place, 1, bounds) as (broken,):
        await broken.enqueue(numbered_pairs([1]))
        with place.client() as client:
            client.hset(
                place.keys.limit,
                mapping={"pairs_tat": 0, "calls_tat": 0, "run": broken.queue.claims.server_run_id},
            )
        claim = await broken.claim_batch()
        await broken.queue.fail(claim, DOWN)
        decision = await broken.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        assert decision.wait_seconds > bounds.slot_seconds


async def test_joining_replica_leaves_next_claim_to_queueing_replica(place: QueueLocation) -> None:
    """It claims later, since the other replica may be gone."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1, 2]))
        assert first.queue._changed._event.is_set()
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1, 2]))
        await second.enqueue(numbered_pairs([2]))
        assert not second.queue._changed._event.is_set()
        await asyncio.wait_for(second.queue.wait_for_change(), 30)
        await second.enqueue(numbered_pairs([2, 3]))
        assert second.queue._changed._event.is_set()


@pytest.mark.parametrize(("before", "now"), [("bulk", "interactive"), ("refresh", "bulk")])
async def test_replica_that_joins_with_better_priority_claims_at_once(
    before: str, now: str, place: QueueLocation
) -> None:
    """The time of the next call may have changed, which the other replica does not know."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1]), request_context(priority=before))
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1]), request_context(priority=now))
        assert second.queue._changed._event.is_set()


async def test_answer_wakes_only_replica_with_waiting_pairs(place: QueueLocation) -> None:
    """Of two replicas whose pair is answered, one waits for other pairs, too."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1, 2]))
        claim = await first.claim_batch()
        await second.enqueue(numbered_pairs([1]))
        await first.enqueue(numbered_pairs([3]))
        for replica in (first, second):
            replica.queue._changed.clear()
        await first.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        await second.receive_messages()
        await first.receive_messages()
        await asyncio.wait_for(first.queue.wait_for_change(), 30)
        assert not second.queue._changed._event.is_set()


async def test_joining_replica_is_woken_when_queueing_replica_has_no_pairs_left(
    place: QueueLocation,
) -> None:
    """The other replica claims nothing from then on. Nothing is published while it waits for other pairs."""
    async with replicas(place, 2) as (first, second):
        one, _ = await first.enqueue(numbered_pairs([1]))
        other, _ = await first.enqueue(numbered_pairs([2]))
        await second.enqueue(numbered_pairs([1]))
        assert second.queue._changed._timer
        second.queue._changed._timer.cancel()
        second.queue._changed.clear()
        await second.receive_messages()
        sequence = second.session.subscription.sequence
        await first.cancel(one)
        await second.receive_messages()
        assert second.session.subscription.sequence == sequence
        one, _ = await first.enqueue(numbered_pairs([1]))
        await first.cancel(other)
        await first.cancel(one)
        await second.receive_messages()
        await asyncio.wait_for(second.queue.wait_for_change(), 30)


async def test_joining_replica_claims_at_once_while_calls_fail(place: QueueLocation) -> None:
    """The replica that queued the pair may be the one that cannot reach the model."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1]))
        await first.queue.fail(await first.claim_batch(), DOWN, retry_after_seconds=0)
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1]))
        assert second.queue._changed._event.is_set()


async def test_repeated_enqueue_after_lost_reply_counts_pairs_as_own(place: QueueLocation) -> None:
    """A replica whose reply was lost joins what it has queued.

    Pairs of a dead replica are claimed by those that join.
    """
    async with replicas(place, 2) as (first, second):
        first.client.lost_replies = 1
        await first.enqueue(numbered_pairs([1]))
        assert first.queue._changed._event.is_set()
        first.expire_heartbeat()
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1]))
        assert second.queue._changed._event.is_set()


async def test_long_enqueue_wakes_dispatcher_after_first_batch(place: QueueLocation) -> None:
    """Other replicas may have joined the batch, and leave the claim to this one."""
    async with replicas(place, 1) as (replica,):
        replica.queue._changed.clear()
        replica.client.delays = (0, 60)
        enqueueing = asyncio.create_task(replica.enqueue(numbered_pairs(range(600))))
        await asyncio.wait_for(replica.queue.wait_for_change(), 20)
        assert not enqueueing.done()
        replica.queue._changed.clear()
        enqueueing.cancel()
        await asyncio.wait([enqueueing])
        # The pairs that it sent may have been queued.
        assert replica.queue._changed._event.is_set()
