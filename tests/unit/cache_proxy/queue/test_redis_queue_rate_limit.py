"""The limit on the model, on Redis's clock, as real claims spend it."""

import asyncio
import math
import time
from itertools import pairwise

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache_proxy.errors import Refused
from services.cache_proxy.queue.interface import Claim, NotYet, QueueLimits
from services.cache_proxy.queue.local.gcra import PACE
from services.cache_proxy.queue.managed_queue import _configure
from tests.support.replicas import Place, Replica, asker, limits, numbers_of, pairs, replicas

pytestmark = pytest.mark.slow  # real servers that come and go, and many examples

SLACK_SECONDS = 0.003  # Redis's clock is read in whole milliseconds, and claims tell theirs in whole ones


async def _slots(
    replica: Replica, *, seconds: float, sizes: list[int], put_back: frozenset[int] = frozenset()
) -> list[tuple[float, int]]:
    """Claim as a dispatcher does, for so long; the slots of what was not put back, and their pairs."""
    clock = replica.place.client()
    numbers = iter(range(10**6))
    taken: list[tuple[float, int]] = []
    until = time.monotonic() + seconds
    claims = 0
    while time.monotonic() < until:
        size = sizes[claims % len(sizes)]
        await replica.ask(pairs([next(numbers) for _ in range(size)]))
        decision = await replica.queue.claim()
        if isinstance(decision, NotYet):
            await asyncio.sleep(min(decision.wait_seconds, 0.1))
            continue
        claims += 1
        if claims in put_back:
            await replica.queue.put_back(decision)
            continue
        spent, calls = clock.hmget(f"{replica.place.keys.limit}", "pairs_tat", "calls_tat")
        assert spent
        assert calls
        slot = float(calls) - 1000 / (replica.bounds.calls_per_second * PACE)
        assert float(spent) >= slot
        taken.append((slot / 1000, len(decision.pairs)))
        await replica.queue.fulfil(decision, {item.digest: 1 for item in decision.pairs})
    clock.close()
    return taken


def _judge(taken: list[tuple[float, int]], bounds: QueueLimits) -> None:
    """No window has more than `calls * T + 1` calls, nor more than `rate * T + batch` pairs."""
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
    """At 50 calls a second, whatever the sizes of batches and whichever are put back."""
    bounds = limits(batch_pairs=8, calls_per_second=50, pairs_per_second=pairs_per_second)

    async def run() -> None:
        async with replicas(Place.new(shared_redis), 1, bounds) as (replica,):
            taken = await _slots(replica, seconds=0.7, sizes=sizes, put_back=put_back)
            _judge(taken, bounds)

    asyncio.run(run())


async def test_a_backlog_uses_the_rate(shared_redis: str) -> None:
    """Two replicas with a backlog have slot after slot: none later than limit or claimer made it."""
    bounds = limits(batch_pairs=8, calls_per_second=20)
    async with replicas(Place.new(shared_redis), 2, bounds) as both:
        for replica in both:
            await replica.ask(pairs(range(2000)))
        slots: list[tuple[float, float, float]] = []  # asked for when, claimed when, and for when

        async def dispatch(replica: Replica) -> None:
            while len(slots) < 31:
                asked_at = time.monotonic()
                decision = await replica.queue.claim()
                if isinstance(decision, Claim):
                    slots.append((asked_at, time.monotonic(), decision.send_at))
                    await replica.queue.fulfil(decision, {item.digest: 1 for item in decision.pairs})
                else:
                    await asyncio.sleep(decision.wait_seconds)

        async def beat() -> None:
            while True:
                await asyncio.gather(*(replica.beat() for replica in both))
                await asyncio.sleep(0.2)

        beating = asyncio.create_task(beat())
        await asyncio.gather(*map(dispatch, both))
        beating.cancel()
        slots.sort(key=lambda slot: slot[2])
        apart, gaps = 1 / (20 * PACE), 0
        for (before, after, earlier), (asked_at, claimed_at, later) in pairwise(slots):
            # Redis's clock is known to a round trip, and counts whole milliseconds.
            unsure = after - before + claimed_at - asked_at + 0.003
            assert later - earlier >= apart - unsure
            # Claimed in time, it follows at once; claimed late, it begins a moment after (`LEAD_MS`).
            gaps += later > max(earlier + apart, claimed_at) + 0.017 + unsure
        assert gaps <= 3  # where the machine stood still between two clocks; what loses slots loses most


async def _wait(replica: Replica) -> float:
    decision = await replica.queue.claim()
    assert isinstance(decision, NotYet)
    return decision.wait_seconds


@pytest.mark.parametrize("lost", ["all", "run", "nonsense", "far"])
async def test_a_limit_that_was_lost_is_a_spent_one(lost: str, shared_redis: str) -> None:
    """After a flush, under another server's id, with what is no number or lies far ahead: one interval."""
    bounds = limits(calls_per_second=0.5)
    place = Place.new(shared_redis)
    async with replicas(place, 1, bounds) as (replica,):
        await replica.ask(pairs([1]))
        with place.client() as client:
            await replica.queue.claim()
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})  # all is free
            if lost == "all":
                place.flush()
                await replica.queue.ask_again()
            elif lost == "run":
                client.hset(place.keys.limit, "run", "0" * 40)
            else:
                value = {"nonsense": "x", "far": 10**15}[lost]
                client.hset(place.keys.limit, mapping={"pairs_tat": value, "calls_tat": value})
        assert 1.9 <= await _wait(replica) <= 2 / PACE


@pytest.mark.parametrize("far", ["pairs_tat", "calls_tat", "not_before", "backoff_until"])
async def test_a_limit_that_lies_far_ahead_refuses_nobody(far: str, shared_redis: str) -> None:
    """A clock that was wrong, say, wrote it: who asks is admitted, so that the next claim puts it right."""
    place = Place.new(shared_redis)
    async with replicas(place, 1, limits(calls_per_second=10)) as (replica,):
        with place.client() as client:
            key = place.keys.model if far == "backoff_until" else place.keys.limit
            client.hset(key, mapping={far: (time.time() + 86_400) * 1000, "failures": 9})
        _, asked = await replica.ask(pairs([1]))
        assert asked.queued
        assert numbers_of(await replica.take()) == [1]


async def test_a_limit_that_is_idle_is_free(shared_redis: str) -> None:
    """After one interval a lone pair goes at once, and the next after an interval."""
    bounds = limits(calls_per_second=0.5)
    async with replicas(Place.new(shared_redis), 1, bounds) as (replica,):
        await replica.ask(pairs([1]))
        assert 0 < await _wait(replica) <= 2 / PACE
        claim = await replica.take()
        await replica.queue.fulfil(claim, {item.digest: 1 for item in claim.pairs})
        await replica.ask(pairs([2]))
        assert 1 < await _wait(replica) <= 2 / PACE + 0.015


async def test_a_server_that_takes_over_is_quiet_at_first(shared_redis: str) -> None:
    """The one before may still serve others: nobody calls until each side knows the other for silent."""
    place = Place.new(shared_redis)
    async with replicas(place, 1, limits(calls_per_second=100)) as (replica,):
        await replica.ask(pairs([1]))
        await replica.queue.fulfil(claim := await replica.take(), {item.digest: 1 for item in claim.pairs})
        await replica.ask(pairs([2]))
        with place.client() as client:
            client.hset(place.keys.limit, "run", "0" * 40)
        assert 1.0 < await _wait(replica) <= 1.2
        assert numbers_of(await replica.take()) == [2]


async def test_who_comes_from_another_server_has_just_called_there(shared_redis: str) -> None:
    """It gets no call before its heartbeat came here too, and from then on nobody does for an interval."""
    place = Place.new(shared_redis)
    async with replicas(place, 2, limits(calls_per_second=2)) as (comes, other):
        await comes.ask(pairs([1]))
        await other.ask(pairs([1]))
        with place.client() as client:
            await _wait(other)
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})  # all is free
            comes.queue.run = "0" * 40
            assert await _wait(comes) < 0.25
            assert client.hget(place.keys.limit, "calls_tat") == b"1"
            await comes.beat()
        for replica in (comes, other):
            assert 0.4 < await _wait(replica) <= 0.5 / PACE


async def test_only_the_last_claim_gives_its_slot_back(shared_redis: str) -> None:
    """Put back at once, the slot is free; after another's claim, a reset or a return from loss it is not."""
    bounds = limits(batch_pairs=2, calls_per_second=4)
    place = Place.new(shared_redis)
    async with replicas(place, 1, bounds) as (replica,):
        with place.client() as client:

            def calls_tat() -> float:
                return float(client.hget(place.keys.limit, "calls_tat") or 0)

            await replica.ask(pairs(range(20)))
            first = await replica.take()
            spent = calls_tat()
            await replica.queue.put_back(first)
            assert calls_tat() < spent - 200
            await replica.queue.put_back(first)  # said twice, it is given back once
            assert calls_tat() < spent - 200
            second, third = await replica.take(), await replica.take()
            spent = calls_tat()
            await replica.queue.put_back(second)
            assert calls_tat() == spent
            client.hset(place.keys.limit, "run", "0" * 40)
            await replica.queue.claim()
            spent = calls_tat()
            await replica.queue.put_back(third)
            assert calls_tat() == spent
            fourth = await replica.take()
            heartbeat = [replica.name, b"\x90", "", 1, 0, 4, 2, b"\x90", ""]  # who was without Redis
            await replica.scripts.run("heartbeat", heartbeat)
            spent = calls_tat()
            await replica.queue.put_back(fourth)
            assert calls_tat() == spent


async def test_a_batch_found_in_the_store_gives_its_slot_back(shared_redis: str) -> None:
    """All of it was answered by others before it was sent, so nothing was spent."""
    place = Place.new(shared_redis)
    async with replicas(place, 1, limits(calls_per_second=1)) as (replica,):
        with place.client() as client:
            await replica.ask(pairs([1]))
            claim = await replica.take()
            spent = float(client.hget(place.keys.limit, "calls_tat") or 0)
            await replica.queue.fulfil(claim, {item.digest: 1 for item in claim.pairs})
            await replica.queue.put_back(claim)
            assert float(client.hget(place.keys.limit, "calls_tat") or 0) < spent - 900


async def test_two_model_versions_share_one_limit_and_no_answers(shared_redis: str) -> None:
    """What one namespace spends the other has not, and the same pair is asked in each."""
    bounds = limits(calls_per_second=0.5)
    place = Place.new(shared_redis)
    async with replicas(place, 1, bounds) as (one,), replicas(place.beside("m"), 1, bounds) as (other,):
        await one.ask(pairs([1]))
        await other.ask(pairs([1]))
        claim = await one.take()
        assert await _wait(other) > 1
        await one.queue.fulfil(claim, {item.digest: 5 for item in claim.pairs})
        assert not other.settled
        await one.beat()
        claim = await other.take()
        await other.queue.fulfil(claim, {item.digest: 6 for item in claim.pairs})
        assert [level for _, level in other.settled] == [6]


async def test_the_newest_start_sets_the_limit(shared_redis: str, caplog: pytest.LogCaptureFixture) -> None:
    """A replica that starts with another rate changes it for all, says so once, and a flush keeps it."""
    place = Place.new(shared_redis)
    async with replicas(place, 1, limits(calls_per_second=1)) as (old,):
        await _configure(old.scripts, old.bounds, old.metrics)
        assert not caplog.records
        await _configure(old.scripts, limits(calls_per_second=0.1), old.metrics)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        await old.beat()
        await old.ask(pairs([1]))
        with place.client() as client:
            client.hdel(place.keys.limit, "run")
            assert 9.9 < await _wait(old) <= 10 / PACE
            place.flush()
            await old.beat()
            assert client.hget(place.keys.limit, "calls_per_second") == str(1 * PACE).encode()


async def test_the_newest_start_sets_the_batch_too(shared_redis: str) -> None:
    """One that knows another size of batch neither sends more, nor takes what a full batch spent for free."""
    rate = 10
    place = Place.new(shared_redis)
    big = limits(batch_pairs=20, pairs_per_second=rate)
    small = limits(batch_pairs=2, pairs_per_second=rate)
    async with replicas(place, 1, small) as (old,), replicas(place, 1, big, first=2) as (new,):
        await _configure(new.scripts, big, new.metrics)
        with place.client() as client:
            await new.ask(pairs(range(20)))
            await new.queue.claim()
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            assert len((await new.take()).pairs) == 20
            await old.ask(pairs(range(100, 120)))
            assert await _wait(old) > 1.9
            await _configure(old.scripts, small, old.metrics)
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            await new.ask(pairs(range(100, 120)))
            assert len((await new.take()).pairs) == 2


@pytest.mark.parametrize("calls", [0, 5])
async def test_probes_keep_to_the_limit_in_pairs(calls: float, shared_redis: str) -> None:
    """Half of a refused batch is so many pairs too."""
    bounds = limits(batch_pairs=100, pairs_per_second=50, calls_per_second=calls)
    place = Place.new(shared_redis)
    async with replicas(place, 1, bounds) as (replica,):
        await replica.ask(pairs(range(100)))
        with place.client() as client:
            await replica.queue.claim()
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
            begun_at = time.monotonic()
            claim = await replica.take()
            await replica.queue.refuse(claim, _refused(), {})
            assert await _wait(replica) + time.monotonic() - begun_at > 1


def _refused() -> Refused:
    return Refused(StatusCode.INVALID_ARGUMENT, "bad")


async def test_nothing_is_paced_without_a_limit(shared_redis: str) -> None:
    """Rates of 0: batch after batch, each to be sent at once."""
    async with replicas(Place.new(shared_redis), 1, limits(batch_pairs=2)) as (replica,):
        await replica.ask(pairs(range(40)), asker())
        for _ in range(20):
            claim = await replica.queue.claim()
            assert isinstance(claim, Claim)
            assert claim.send_at <= time.monotonic()
        assert await replica.queue.claim() == NotYet(math.inf)
