"""Tests of replicas that crash, pause or lose Redis: their claims, their time slots, and missed messages.

More than 250 lines: claims, slots and messages all depend on the same heartbeats.
"""

import asyncio
import math
import time
from typing import Any
from urllib.parse import urlsplit

import msgpack
import pytest

from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.common.tasks import cancel_and_wait
from tests.support.faulty_link import faulty_link
from tests.support.redis_server import wait_for
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pair,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
)

# They wait until a replica counts as silent.
pytestmark = pytest.mark.slow


@pytest.fixture
def place(shared_redis: str) -> QueueLocation:
    """Return a new deployment."""
    return QueueLocation.create(shared_redis)


async def _lost_claim(replica: Replica) -> None:
    """Claim a batch whose reply is lost."""
    bounds = replica.limits
    await replica.scripts.run(
        "claim",
        [
            replica.name,
            "lost",
            0,
            0,
            bounds.batch_pairs,
            bounds.batch_bytes,
            0,
            30000,
            60,
            replica.queue.claims.server_run_id,
            -1,
        ],
    )


async def test_claims_of_crashed_replica_are_taken_back_at_once(place: QueueLocation) -> None:
    """It has no subscription and no heartbeat.

    Another one's heartbeat frees its pairs, and waiting replicas are woken.
    """
    async with replicas(place, 2) as (dead, other):
        await dead.enqueue(numbered_pairs([1, 2]))
        await other.enqueue(numbered_pairs([1, 2]))
        await dead.claim_batch()
        assert await other.queue.claim() == ClaimDeferred(math.inf)
        other.queue._changed.clear()
        await dead.crash()
        await other.heartbeat()
        await other.receive_messages()
        await asyncio.wait_for(other.queue.wait_for_change(), 30)
        assert sorted(pair_numbers(await other.claim_batch())) == [1, 2]


async def test_paused_replica_keeps_claims_until_lease_ends(place: QueueLocation) -> None:
    """It is subscribed without heartbeats. Its call may be under way, so its pairs are not sent again yet."""
    async with replicas(place, 2) as (paused, other):
        await paused.enqueue(numbered_pairs([1]))
        await other.enqueue(numbered_pairs([1]))
        claim = await paused.claim_batch()
        paused.expire_heartbeat()
        await other.heartbeat()
        assert not isinstance(await other.queue.claim(), Claim)
        place.age_claims(36_000)
        assert pair_numbers(await other.claim_batch()) == [1]
        # The replica continues after its pause.
        await paused.queue.complete(claim, {item.digest: 4 for item in claim.pairs})
        await other.receive_messages()
        assert [level for _, level in other.resolved] == [4]
        assert await other.queue.claim() == ClaimDeferred(math.inf)


async def test_unlisted_claim_is_taken_back(place: QueueLocation) -> None:
    """Its reply was lost. It is kept for the time in which the owner may repeat the script."""
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs([1, 2]))
        await _lost_claim(replica)
        await replica.heartbeat()
        assert not isinstance(await replica.queue.claim(), Claim)
        place.age_claims(2_500)
        await replica.heartbeat()
        assert sorted(pair_numbers(await replica.claim_batch())) == [1, 2]


async def test_listed_claim_is_kept_within_its_lease(place: QueueLocation) -> None:
    """However long the call takes, and also when a part of it is answered."""
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs([1, 2]))
        claim = await replica.claim_batch()
        await replica.queue.complete(claim, {claim.pairs[0].digest: 1})
        place.age_claims(20_000)
        await replica.heartbeat()
        assert not isinstance(await replica.queue.claim(), Claim)
        await replica.queue.complete(claim, {claim.pairs[1].digest: 1})
        assert replica.queue.claims.ids == []
        assert place.leftover_keys() == {}


async def test_repeated_claim_returns_same_batch(place: QueueLocation) -> None:
    """The reply was lost. Pairs that ended meanwhile are not in the batch."""
    async with replicas(place, 2) as (replica, other):
        await replica.enqueue(numbered_pairs([1, 2, 3]))
        replica.client.lost_replies = 2
        claim = await replica.claim_batch()
        assert sorted(pair_numbers(claim)) == [1, 2, 3]
        assert replica.queue.claims.ids == [claim.id]
        await other.enqueue(numbered_pairs([3]))
        assert not isinstance(await other.queue.claim(), Claim)


async def test_pairs_whose_owners_crashed_twice_are_sent_alone(place: QueueLocation) -> None:
    """A full batch of them is sent in halves: single calls would take every slot."""
    async with replicas(place, 1, queue_limits(batch_pairs=100)) as (replica,):
        await replica.enqueue(numbered_pairs(range(5)))
        for _ in range(2):
            await replica.claim_batch()
            place.age_claims(60_000)
        sizes = []
        while isinstance(claim := await replica.queue.claim(), Claim):
            sizes.append(len(claim.pairs))
            await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        assert sizes == [1] * 5
        await replica.enqueue(numbered_pairs(range(100, 200)))
        for _ in range(2):
            await replica.claim_batch()
            place.age_claims(60_000)
        sizes = []
        while isinstance(claim := await replica.queue.claim(), Claim):
            sizes.append(len(claim.pairs))
            await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        assert sum(sizes) == 100
        assert len(sizes) <= 9
        assert place.leftover_keys() == {}


async def test_many_claims_are_taken_back_in_parts(place: QueueLocation) -> None:
    """A replica crashes with 10000 claimed pairs. Each heartbeat takes back about 2000 of them."""
    async with replicas(place, 2, queue_limits(batch_pairs=1000)) as (dead, other):
        await dead.enqueue(numbered_pairs(range(10_000)))
        await other.enqueue(numbered_pairs(range(10_000)))
        for _ in range(10):
            await dead.claim_batch()
        await dead.crash()
        waiting = []
        for _ in range(5):
            await other.heartbeat()
            with place.client() as client:
                waiting.append(client.zcard(f"{place.keys.base}lane:interactive"))
        assert waiting[0] <= 3000
        assert waiting[-1] == 10_000


@pytest.mark.parametrize(("verdict", "free"), [("alive", True), ("paused", False), (None, False)])
async def test_claims_of_replica_that_lost_redis_are_taken_back(
    verdict: str | None, free: bool, place: QueueLocation
) -> None:
    """It runs, is subscribed and silent for seconds.

    Those of a paused replica, or of one in an unknown state, are kept until the lease ends.
    """
    async with replicas(place, 2) as (silent, other):
        await silent.enqueue(numbered_pairs([1]))
        await other.enqueue(numbered_pairs([1]))
        await silent.claim_batch()
        silent.expire_heartbeat()
        if verdict:
            await other.scripts.run("set_peer_state", [silent.name, verdict, 3000])
        await other.session._heartbeat()
        assert isinstance(await other.queue.claim(), Claim) == free
        await other.session._peer_prober.close()


@pytest.mark.parametrize(
    ("verdict", "free"), [("gone", True), ("paused", True), ("alive", False), (None, False)]
)
async def test_slots_of_silent_replica_are_left_free_unless_it_is_gone_or_paused(
    verdict: str | None, free: bool, place: QueueLocation
) -> None:
    """A replica that may have lost Redis keeps its slots."""
    bounds = queue_limits(batch_pairs=1, calls_per_second=20)
    async with replicas(place, 2, bounds) as (silent, other):
        await other.heartbeat()
        await other.enqueue(numbered_pairs(range(200)))
        moments: set[int] = set()
        with place.client() as client:
            members = (client.hget(place.keys.limit, "members") or b"").decode().split(",")
            moment_ms = math.ceil(1.03 * 1000 / float(client.hget(place.keys.limit, "calls_per_second") or 0))
        block = math.ceil(1000 / moment_ms)
        loop = asyncio.get_running_loop()
        until = loop.time() + 2.3
        while loop.time() < until:
            silent.expire_heartbeat()
            if verdict == "gone":
                await other.scripts.run("set_peer_state", [silent.name, "gone", 0])
            elif verdict:
                await other.scripts.run("set_peer_state", [silent.name, verdict, 3000])
            await other.session._heartbeat()
            claim = await other.queue.claim()
            if isinstance(claim, ClaimDeferred):
                await asyncio.sleep(min(claim.wait_seconds, 0.02))
                continue
            with place.client() as client:
                spent = float(client.hget(place.keys.limit, "calls_tat") or 0)
                rate = float(client.hget(place.keys.limit, "calls_per_second") or 0)
            moments.add(round((spent - 1000 / rate - 7) / moment_ms))
            await other.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        owners = {members[moment // block % 2] for moment in moments}
        assert owners == ({silent.name, other.name} if free else {other.name})
        await other.session._peer_prober.close()


async def test_members_do_not_change_while_one_is_silent(place: QueueLocation) -> None:
    """A new replica gets slots when the heartbeats of all have been received."""
    async with replicas(place, 2) as (silent, other):
        await other.heartbeat()
        silent.expire_heartbeat()
        with place.client() as client:
            client.zadd(f"{place.keys.limit}:replicas", {"f" * 16: (client.time()[0] + 60) * 1000})
            await other.heartbeat()
            assert b"f" not in (client.hget(place.keys.limit, "members") or b"")
            await silent.heartbeat()
            assert b"f" * 16 in (client.hget(place.keys.limit, "members") or b"")
        await other.session._peer_prober.close()


async def test_slow_heartbeat_does_not_change_clock_offset(place: QueueLocation) -> None:
    """Redis is often slow before it is lost. The offset stays as exact as a quick reply showed it."""
    async with replicas(place) as (replica,):

        def offset() -> float:
            membership = replica.failover._limiter._membership
            assert membership is not None
            return membership.clock_offset_seconds

        async def beat() -> float:
            began = time.monotonic()
            await replica.heartbeat()
            # Redis's clock is read in whole milliseconds.
            return time.monotonic() - began + 0.001

        # The length of a quick heartbeat bounds the error of the offset.
        quick = await beat()
        known = offset()
        replica.client.delays = (0.2,)
        await replica.heartbeat()
        assert abs(offset() - known) < max(quick, 0.01)
        # As before a failover to another clock.
        replica.session._clock_offset.seconds = known - 3600
        quick += await beat()
        assert abs(offset() - known) < max(quick, 0.01)


async def test_lost_message_is_noticed_by_second_heartbeat(place: QueueLocation) -> None:
    """The heartbeat brings the number of the last message, and the waiting pairs are enqueued again."""
    async with replicas(place, 2) as (one, other):
        wait, _ = await other.enqueue(numbered_pairs([1]))
        await one.enqueue(numbered_pairs([1]))
        claim = await one.claim_batch()
        await one.queue.complete(claim, {item.digest: 6 for item in claim.pairs})
        await other.receive_messages(lost=True)
        for _ in range(2):
            await other.heartbeat()
        assert not wait.pending
        assert list(wait.outcomes.values()) == [6]


async def test_gap_in_message_numbers_is_noticed_by_next_message(place: QueueLocation) -> None:
    """The waiting pairs are enqueued again at once."""
    async with replicas(place, 2) as (one, other):
        wait, _ = await other.enqueue(numbered_pairs([1]))
        await one.enqueue(numbered_pairs([1]))
        claim = await one.claim_batch()
        await other.heartbeat()
        await one.queue.claims.publish({numbered_pairs([8])[0].digest: 1})
        await other.receive_messages()
        await one.queue.complete(claim, {item.digest: 6 for item in claim.pairs})
        await other.receive_messages(lost=True)
        await one.queue.claims.publish({numbered_pairs([9])[0].digest: 1})
        await other.receive_messages()
        await other.recover()
        assert not wait.pending


async def test_redis_failover_that_lost_writes_is_noticed(place: QueueLocation) -> None:
    """The new master has published fewer messages than the old one."""
    async with replicas(place) as (replica,):
        for number in range(5):
            await replica.queue.claims.publish({numbered_pairs([100 + number])[0].digest: 1})
        await replica.receive_messages()
        await replica.heartbeat()
        await replica.enqueue(numbered_pairs([1]))
        with place.client() as client:
            client.delete(f"{place.keys.base}pairs", f"{place.keys.base}lane:interactive")
            client.hincrby(f"{place.keys.base}meta", "published", -2)
        await replica.heartbeat()
        assert pair_numbers(await replica.claim_batch()) == [1]


async def test_dead_subscription_is_replaced(shared_redis: str) -> None:
    """Its connection is dead without an error. Heartbeats show that messages are missed."""
    port = urlsplit(shared_redis).port
    assert port
    with faulty_link(port) as wire:
        async with replicas(QueueLocation.create(wire.url)) as (replica,):
            listening = asyncio.create_task(replica.session.subscription.run())
            while not replica.session.subscription.missed.is_set():  # noqa: ASYNC110 - set when it has subscribed
                await asyncio.sleep(0.01)
            wire.mute_subscriptions()
            wait, _ = await replica.enqueue(numbered_pairs([1]))
            async with asyncio.timeout(10):
                while wait.pending:
                    await replica.session._heartbeat()
                    await replica.queue.claims.publish({numbered_pairs([1])[0].digest: 3})
                    await asyncio.sleep(0.2)
            await cancel_and_wait([listening])


async def test_outcome_found_by_enqueue_resolves_earlier_request(place: QueueLocation) -> None:
    """The message was lost. The next request for the pair finds its outcome."""
    async with replicas(place, 2) as (one, other):
        first, _ = await other.enqueue(numbered_pairs([1]))
        await one.enqueue(numbered_pairs([1]))
        claim = await one.claim_batch()
        await one.queue.complete(claim, {item.digest: 6 for item in claim.pairs})
        await other.receive_messages(lost=True)
        second, enqueued = await other.enqueue(numbered_pairs([1]))
        assert list(enqueued.outcomes.values()) == [6]
        assert not first.pending
        assert not second.pending


@pytest.mark.parametrize("ahead_seconds", [-60, 60])
async def test_redis_failover_to_another_clock_ends_no_lease(
    place: QueueLocation, ahead_seconds: int
) -> None:
    """The new server's clock is a minute off, and the owner is not connected yet."""
    async with replicas(place, 2) as (one, two):
        await one.enqueue(numbered_pairs([1]))
        await two.enqueue(numbered_pairs([1]))
        claim = await one.claim_batch()
        # The other clock differs by this.
        place.age_claims(ahead_seconds * 1000)
        _granted_by_another_server(place)
        # The new server has not received the owner's heartbeat yet.
        with place.client() as client:
            client.zadd(f"{place.keys.limit}:replicas", {one.name: 0})
        await one._pubsub.unsubscribe()
        with place.client() as client:
            channel = f"{one.scripts.channel}:{one.name}"
            wait_for(lambda: client.pubsub_numsub(channel)[0][1] == 0, description="the subscription ends")
        await two.heartbeat()
        assert isinstance(await two.queue.claim(), ClaimDeferred)
        await one.heartbeat()
        await two.heartbeat()
        assert isinstance(await two.queue.claim(), ClaimDeferred)
        await one.queue.complete(claim, {numbered_pair(1).digest: 3})
        assert place.leftover_keys() == {}


async def test_lease_after_redis_failover_ends_in_time(place: QueueLocation) -> None:
    """It starts again with the failover, with its usual length."""
    async with replicas(place, 2) as (one, two):
        await one.enqueue(numbered_pairs([1]))
        await two.enqueue(numbered_pairs([1]))
        await one.claim_batch()
        _granted_by_another_server(place)
        await two.heartbeat()
        with place.client() as client:
            [packed] = client.hvals(f"{place.keys.base}claims")
        moved = msgpack.unpackb(packed, raw=True)
        assert moved[b"lease_until"] - moved[b"since"] == pytest.approx(35_000, abs=1000)
        with place.client() as client:
            [claim_id] = client.hkeys(f"{place.keys.base}claims")
            moved |= {b"lease_until": moved[b"since"] - 10_000, b"since": moved[b"since"] - 10_000}
            client.hset(f"{place.keys.base}claims", claim_id, msgpack.packb(moved, use_bin_type=False))
        await two.heartbeat()
        assert pair_numbers(await two.claim_batch()) == [1]


def _granted_by_another_server(place: QueueLocation) -> None:
    with place.client() as client:
        for claim_id, packed in client.hgetall(f"{place.keys.base}claims").items():
            claim = msgpack.unpackb(packed, raw=True) | {b"run": b"another"}
            client.hset(f"{place.keys.base}claims", claim_id, msgpack.packb(claim, use_bin_type=False))


async def test_repeated_claim_after_its_end_claims_nothing(place: QueueLocation) -> None:
    """The first reply was lost, and the repeated script was granted and completed."""
    async with replicas(place) as (replica,):
        sent: list[list[Any]] = []
        run = replica.scripts.run

        async def recording(name: str, arguments: list[Any]) -> Any:
            if name == "claim":
                sent.append(arguments)
            return await run(name, arguments)

        replica.scripts.run = recording  # type: ignore[method-assign,assignment]
        await replica.enqueue(numbered_pairs([1]))
        claim = await replica.claim_batch()
        await replica.queue.complete(claim, {numbered_pair(1).digest: 3})
        await replica.enqueue(numbered_pairs([2]))
        assert (await run("claim", sent[-1]))[0] == b"wait"
        assert pair_numbers(await replica.claim_batch()) == [2]
