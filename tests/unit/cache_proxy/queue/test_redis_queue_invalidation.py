"""Tests of pairs that are invalidated while they are in a call."""

import pytest

from services.cache_proxy.cache.cache_scripts import ADD_TOMBSTONES
from services.cache_proxy.cache.invalidation import InvalidationFollower, InvalidationLog
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from tests.support.replicas import (
    QueueLocation,
    numbered_pair,
    numbered_pairs,
    replicas,
)


@pytest.fixture
def place(shared_redis: str) -> QueueLocation:
    """Return a new deployment."""
    return QueueLocation.create(shared_redis)


@pytest.mark.parametrize("all_of_them", [False, True])
async def test_answer_invalidated_in_a_call_is_not_remembered(shared_redis: str, all_of_them: bool) -> None:
    """Its waiters get it, and later requests infer the pair again. Other answers are remembered."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (one,):
        await one.enqueue(numbered_pairs([0]))
        await one.queue.complete(before := await one.claim_batch(), {pair.digest: 5 for pair in before.pairs})
        wait, _ = await one.enqueue(numbered_pairs([1, 2]))
        claim = await one.claim_batch()
        with place.client() as client:
            buried = b"" if all_of_them else numbered_pairs([1])[0].digest
            client.eval(ADD_TOMBSTONES.text, 1, f"{place.keys.base}tombs", buried)
        await one.queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        assert set(wait.outcomes.values()) == {3}
        _, again = await one.enqueue(numbered_pairs([1, 2]))
        known = [] if all_of_them else [numbered_pairs([2])[0].digest]
        assert list(again.outcomes) == known
        await one.claim_batch()


async def test_answer_invalidated_in_a_call_is_logged_as_its_pair_ends(shared_redis: str) -> None:
    """The claiming replica may crash before it stores the answer. Other caches that took it still drop it."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (one,):
        reached = backend_for(create_client(shared_redis, timeout_seconds=5))
        forgotten: list[bytes] = []
        follower = InvalidationFollower(
            InvalidationLog(reached, place.keys.invalidation_log), remove=forgotten.append, clear=lambda: None
        )
        await follower.poll()
        await one.enqueue(numbered_pairs([1, 2]))
        claim = await one.claim_batch()
        with place.client() as client:
            client.eval(ADD_TOMBSTONES.text, 1, f"{place.keys.base}tombs", numbered_pair(1).digest)
        # The pair is in a call from before the invalidation.
        await one.enqueue(numbered_pairs([1]))
        await one.queue.complete(claim, {item.digest: 3 for item in claim.pairs})
        await follower.poll()
        assert forgotten == [numbered_pair(1).digest]
        await reached.close()


async def test_late_answer_of_invalidated_pair_is_not_remembered(shared_redis: str) -> None:
    """After the claim has ended its start is unknown, so any tombstone counts."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (one,):
        await one.enqueue(numbered_pairs([1, 2]))
        claim = await one.claim_batch()
        await one.queue.release(claim)
        with place.client() as client:
            client.eval(ADD_TOMBSTONES.text, 1, f"{place.keys.base}tombs", numbered_pairs([1])[0].digest)
        await one.queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        _, again = await one.enqueue(numbered_pairs([1, 2]))
        assert list(again.outcomes) == [numbered_pairs([2])[0].digest]
