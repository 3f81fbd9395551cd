"""Deployments of one name in several databases of one server, which share their channels."""

import secrets

import pytest

from services.cache_proxy.queue.serialization import pack
from tests.support.replicas import Place, pair, pairs, replicas


@pytest.fixture
def place(shared_redis: str) -> Place:
    """A deployment of the test's own, in database 0."""
    return Place.new(shared_redis)


async def test_answer_in_one_database_reaches_no_caller_of_another(place: Place) -> None:
    """The same pair waits in three databases. The answer given in one of them is heard there alone."""
    elsewhere = [Place(f"{place.url}/{database}", place.keys) for database in (1, 2)]
    async with (
        replicas(place) as (first,),
        replicas(elsewhere[0]) as (second,),
        replicas(elsewhere[1]) as (third,),
    ):
        everyone = (first, second, third)
        for replica in everyone:
            await replica.ask([pair(1)])
        claim = await second.take()
        await second.queue.fulfil(claim, {pair(1).digest: 5})
        for replica in everyone:
            await replica.messages()
            await replica.beat()
        assert [set(replica.settled) for replica in everyone] == [set(), {(pair(1).digest, 5)}, set()]


async def test_message_with_another_queue_id_is_not_believed(place: Place) -> None:
    """Whoever may publish on the channel, and what was published before a flush, ends no pair."""
    async with replicas(place) as (replica,):
        wait, _ = await replica.ask(pairs(range(3)))
        number = replica.listener._heard.number
        for queue_id in (b"", secrets.token_bytes(8), 7, None):
            levels = b"".join(one.digest + bytes([7]) for one in pairs(range(3)))
            forged = pack([number + 1, levels, [], False, queue_id])
            await replica.client.publish(replica.scripts.channel, forged)
        await replica.messages()
        assert replica.settled == []
        await replica.heal()
        claim = await replica.take()
        await replica.queue.fulfil(claim, {one.digest: 2 for one in claim.pairs})
        await replica.messages()
        assert {level for _, level in replica.settled} == {2}
        await replica.close(wait)


async def test_messages_after_a_flush_are_believed_once_the_heartbeat_has_seen_the_new_queue(
    place: Place,
) -> None:
    """The queue that is made after a flush has another id; nobody waits longer than a heartbeat for it."""
    async with replicas(place, 2) as (asking, answering):
        await asking.ask([pair(1)])
        await answering.ask([pair(1)])
        place.flush()
        for replica in (asking, answering):
            await replica.beat()
        claim = await answering.take()
        await answering.queue.fulfil(claim, {pair(1).digest: 3})
        await asking.messages()
        assert set(asking.settled) == {(pair(1).digest, 3)}
