"""Deaths, losses and silence under load: no wrong answer, no failed caller, nothing stuck, no full window."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import redis.asyncio

from tests.fleet.scenarios import callers, hits, owner_of_a_call, steady_misses
from tests.support.call_log import Call, inferences, most_over
from tests.support.caller import pairs_of
from tests.support.fleet import Fleet
from tests.support.load_callers import Tally
from tests.support.processes import Service

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

CALLS_PER_SECOND, BATCH_PAIRS = 5, 200
FLAGS = (
    "--model-calls-per-second", str(CALLS_PER_SECOND), "--model-rate", str(CALLS_PER_SECOND * BATCH_PAIRS),
    "--model-batch-size", str(BATCH_PAIRS), "--model-deadline", "3s", "--expected-replicas", "3",
)  # fmt: skip
SEEN_LATE_SECONDS = 0.1  # see test_paced.py; here a slot is a fifth of a second
TIMES = 10


@asynccontextmanager
async def load(proxies: Sequence[Service], tally: Tally) -> AsyncIterator[None]:
    """A load within the block. When it ends, every caller has been answered."""
    over = asyncio.Event()
    loading = asyncio.create_task(steady_misses([proxy.target for proxy in proxies], over, tally))
    try:
        yield
    finally:
        over.set()
        async with asyncio.timeout(60):
            await loading


async def _nothing_is_stuck(fleet: Fleet) -> None:
    async with asyncio.timeout(20), redis.asyncio.Redis.from_url(fleet.redis.url) as client:
        kinds = ("pairs", "claims", "claimed", "suspects")
        while any([await client.keys(f"*:{kind}") for kind in kinds]):  # noqa: ASYNC110 - Redis has no event
            await asyncio.sleep(0.1)


def _excused(
    calls: Sequence[Call], moments: Sequence[float], *, before: float, after: float
) -> set[tuple[str, str]]:
    """The pairs of the calls that came so shortly before or after one of these moments."""
    return {
        pair
        for call in calls
        if any(moment - before <= call.at <= moment + after for moment in moments)
        for pair in call.pairs
    }


def _over_seconds(calls: Sequence[Call]) -> float:
    rate = CALLS_PER_SECOND * BATCH_PAIRS
    return max(most_over(calls, pairs_per_second=rate, calls_per_second=CALLS_PER_SECOND))


def _twice(calls: Sequence[Call]) -> set[tuple[str, str]]:
    return {pair for pair, times in inferences(calls).items() if times > 1}


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_owners_that_are_killed_cost_their_own_calls_alone(running: Fleet) -> None:
    """Ten times the replica whose call is with the model is killed, and another starts: every caller that
    comes back is answered, and only pairs of the killed ones' calls are inferred twice.
    """  # noqa: D205 - one thought
    proxies = running.start_all(3, *FLAGS)
    tally, kills, over = Tally(), [], asyncio.Event()
    for turn in range(TIMES):
        loading = asyncio.create_task(
            steady_misses([proxy.target for proxy in proxies], over, tally, name=f"kill {turn}")
        )
        await asyncio.sleep(1)
        owner = await owner_of_a_call(running, proxies)
        owner.process.kill()
        kills.append(time.time())
        proxies.remove(owner)
        await asyncio.sleep(1)
        over.set()
        async with asyncio.timeout(60):
            await loading
        over.clear()
        proxies.append(await asyncio.to_thread(running.start, *FLAGS))
    assert (tally.wrong, tally.failed) == ([], [])
    await _nothing_is_stuck(running)
    calls = running.calls
    assert _twice(calls) <= _excused(calls, kills, before=0.4, after=0.1)
    assert (
        max(most_over(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND)) <= SEEN_LATE_SECONDS
    )


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_redis_that_is_killed_costs_a_second_of_answers_at_most(running: Fleet) -> None:
    """Ten kills under load, back half a second later with what its log of a second ago had, and a flush:
    every caller is answered, and only what was under way around a kill is inferred twice.
    """  # noqa: D205 - one thought
    proxies = running.start_all(3, *FLAGS)
    tally, kills = Tally(), []
    async with load(proxies, tally):
        for _ in range(TIMES):
            await asyncio.sleep(2)
            kills.append(time.time())
            await asyncio.to_thread(running.redis.kill_and_start, seconds=0.5)
        await asyncio.sleep(2)
        async with redis.asyncio.Redis.from_url(running.redis.url) as client:
            kills.append(time.time())
            await client.flushall()
        await asyncio.sleep(2)
    assert (tally.wrong, tally.failed) == ([], [])
    await _nothing_is_stuck(running)
    calls = running.calls
    assert _twice(calls) <= _excused(calls, kills, before=2.0, after=4.0)
    assert (
        max(most_over(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND)) <= SEEN_LATE_SECONDS
    )
    for proxy in proxies:
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_lost_replies_cost_nothing(running: Fleet) -> None:
    """Each replica loses a tenth of its scripts' replies: all callers are answered, no pair is sent twice."""
    wires = [running.wire() for _ in range(3)]
    proxies = [running.start(*FLAGS, wire=wire) for wire in wires]
    for wire in wires:
        wire.lose_share = 0.1
    tally = Tally()
    async with load(proxies, tally):
        await asyncio.sleep(15)
    assert (tally.wrong, tally.failed) == ([], [])
    assert sum(wire.lost for wire in wires) > 100
    for wire in wires:
        wire.lose_share = 0
    await _nothing_is_stuck(running)
    assert not _twice(running.calls)


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_a_redis_that_is_paused_stops_nobody(running: Fleet) -> None:
    """Stopped for ten seconds under load: hits as fast as ever, misses within five seconds, the fleet within
    its limit without a word between replicas; then all return, one warning each for queue and store.
    """  # noqa: D205 - one thought
    proxies = running.start_all(3, *FLAGS)
    known, quick, slow, over = pairs_of("known", 100), Tally(), Tally(), asyncio.Event()
    async with callers([[proxy.target] for proxy in proxies], Tally()) as each:
        await asyncio.gather(*(caller.ask(known) for caller in each))
    async with load(proxies, slow):
        hitting = [asyncio.create_task(hits(proxy.target, known, over, quick)) for proxy in proxies]
        await asyncio.sleep(1)
        running.redis.pause()
        await asyncio.sleep(10)
        running.redis.resume()
        await asyncio.sleep(4)
        over.set()
        await asyncio.gather(*hitting)
    assert (slow.wrong, slow.failed, quick.wrong, quick.failed) == ([], [], [], [])
    assert quick.misses == 0
    assert quick.percentile(0.99) <= 0.05
    assert slow.percentile(1.0) <= 5
    calls = running.calls
    assert (
        max(most_over(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND)) <= SEEN_LATE_SECONDS
    )
    for proxy in proxies:
        assert proxy.log.count("WARNING") == 2
        assert "the shared queue is back" in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_replica_that_is_cut_off_alone_keeps_to_its_own_moments(running: Fleet) -> None:
    """One of three loses Redis for eight seconds: callers are answered, the fleet stays within the limit, and
    it returns by itself.
    """  # noqa: D205 - one thought
    wire = running.wire()
    proxies = [running.start(*FLAGS, wire=wire), *running.start_all(2, *FLAGS)]
    tally = Tally()
    async with load(proxies, tally):
        await asyncio.sleep(3)
        wire.cut()
        await asyncio.sleep(8)
        wire.mend()
        await asyncio.sleep(4)
    assert (tally.wrong, tally.failed) == ([], [])
    assert tally.percentile(1.0) <= 5
    await _nothing_is_stuck(running)
    calls = running.calls
    assert (
        max(most_over(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND)) <= SEEN_LATE_SECONDS
    )
    assert "the shared queue is back" in proxies[0].log
    assert all("is lost" not in proxy.log for proxy in proxies[1:])


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_two_model_versions_share_one_limit_and_no_answers(running: Fleet) -> None:
    """Two replicas of each, started with rates of their own: each version asks for itself, and all together
    keep to the limit of the newest start.
    """  # noqa: D205 - one thought
    both = [
        *running.start_all(2, *FLAGS, "--model-version", "1", "--model-calls-per-second", "20"),
        *running.start_all(2, *FLAGS, "--model-version", "2"),
    ]
    tallies = [Tally(), Tally()]
    over = asyncio.Event()
    loading = [
        asyncio.create_task(steady_misses([proxy.target for proxy in pair], over, tally))
        for pair, tally in zip((both[:2], both[2:]), tallies, strict=True)
    ]
    await asyncio.sleep(8)
    over.set()
    await asyncio.gather(*loading)
    for tally in tallies:
        assert (tally.wrong, tally.failed) == ([], [])
    calls = running.calls
    assert max(inferences(calls).values()) == 2  # once for each version
    assert _over_seconds(calls) <= SEEN_LATE_SECONDS
    assert "rate limits in Redis differed from this replica's settings" in both[2].log
    assert "(calls/s 20 -> 5)" in both[2].log
