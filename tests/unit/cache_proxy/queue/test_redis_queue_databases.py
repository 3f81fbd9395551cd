"""Tests of deployments of one name in several databases of a server, whose channels they share."""

import secrets

import pytest

from services.cache_proxy.queue.serialization import pack
from tests.support.replicas import QueueLocation, numbered_pair, numbered_pairs, replicas


@pytest.fixture
def place(shared_redis: str) -> QueueLocation:
    """Return a new deployment in database 0."""
    return QueueLocation.create(shared_redis)


async def test_answer_in_one_database_reaches_no_caller_of_another(place: QueueLocation) -> None:
    """The same pair waits in three databases, and is answered in one."""
    elsewhere = [QueueLocation(f"{place.url}/{database}", place.keys) for database in (1, 2)]
    async with (
        replicas(place) as (first,),
        replicas(elsewhere[0]) as (second,),
        replicas(elsewhere[1]) as (third,),
    ):
        everyone = (first, second, third)
        for replica in everyone:
            await replica.enqueue([numbered_pair(1)])
        claim = await second.claim_batch()
        await second.queue.complete(claim, {numbered_pair(1).digest: 5})
        for replica in everyone:
            await replica.receive_messages()
            await replica.heartbeat()
        assert [set(replica.resolved) for replica in everyone] == [
            set(),
            {(numbered_pair(1).digest, 5)},
            set(),
        ]


async def test_message_with_another_queue_id_is_ignored(place: QueueLocation) -> None:
    """Neither forged messages nor those from before a flush resolve a pair."""
    async with replicas(place) as (replica,):
        wait, _ = await replica.enqueue(numbered_pairs(range(3)))
        number = replica.session.subscription.sequence
        for queue_id in (b"", secrets.token_bytes(8), 7, None):
            levels = b"".join(one.digest + bytes([7]) for one in numbered_pairs(range(3)))
            forged = pack([number + 1, levels, [], False, queue_id])
            await replica.client.publish(replica.scripts.channel, forged)
        await replica.receive_messages()
        assert replica.resolved == []
        await replica.recover()
        claim = await replica.claim_batch()
        await replica.queue.complete(claim, {one.digest: 2 for one in claim.pairs})
        await replica.receive_messages()
        assert {level for _, level in replica.resolved} == {2}
        await replica.cancel(wait)


async def test_messages_after_flush_are_applied_after_next_heartbeat(
    place: QueueLocation,
) -> None:
    """The queue that is made after a flush has another id, which the heartbeat brings."""
    async with replicas(place, 2) as (waiting, claiming):
        await waiting.enqueue([numbered_pair(1)])
        await claiming.enqueue([numbered_pair(1)])
        place.flush()
        for replica in (waiting, claiming):
            await replica.heartbeat()
        claim = await claiming.claim_batch()
        await claiming.queue.complete(claim, {numbered_pair(1).digest: 3})
        await waiting.receive_messages()
        assert set(waiting.resolved) == {(numbered_pair(1).digest, 3)}
