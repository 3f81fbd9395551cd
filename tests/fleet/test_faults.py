"""Deaths, losses and silence under load: no wrong answer, no failed caller, nothing stuck, no full window."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import redis.asyncio

from tests.fleet.scenarios import find_replica_in_call, load_callers, send_hits, send_steady_misses
from tests.support.call_log import LoggedCall, count_inferences, max_limit_excess_seconds
from tests.support.caller import make_pairs
from tests.support.fleet import Fleet
from tests.support.load_callers import LoadStats
from tests.support.processes import ServiceProcess

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

CALLS_PER_SECOND, BATCH_PAIRS = 5, 200
FLAGS = (
    "--model-calls-per-second",
    str(CALLS_PER_SECOND),
    "--model-rate",
    str(CALLS_PER_SECOND * BATCH_PAIRS),
    "--model-batch-size",
    str(BATCH_PAIRS),
    "--model-deadline",
    "3s",
    "--expected-replicas",
    "3",
)
SEEN_LATE_SECONDS = 0.1  # see test_paced.py; here a slot is a fifth of a second
TIMES = 10


@asynccontextmanager
async def load(proxies: Sequence[ServiceProcess], tally: LoadStats) -> AsyncIterator[None]:
    """A load within the block. When it ends, every caller has been answered."""
    over = asyncio.Event()
    loading = asyncio.create_task(send_steady_misses([proxy.target for proxy in proxies], over, tally))
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
    calls: Sequence[LoggedCall], moments: Sequence[float], *, before: float, after: float
) -> set[tuple[str, str]]:
    """The pairs of the calls that came so shortly before or after one of these moments."""
    return {
        pair
        for call in calls
        if any(moment - before <= call.unix_seconds <= moment + after for moment in moments)
        for pair in call.pairs
    }


def _over_seconds(calls: Sequence[LoggedCall]) -> float:
    rate = CALLS_PER_SECOND * BATCH_PAIRS
    return max(max_limit_excess_seconds(calls, pairs_per_second=rate, calls_per_second=CALLS_PER_SECOND))


def _twice(calls: Sequence[LoggedCall]) -> set[tuple[str, str]]:
    return {pair for pair, times in count_inferences(calls).items() if times > 1}


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_owners_that_are_killed_cost_their_own_calls_alone(running: Fleet) -> None:
    """Ten times the replica whose call is with the model is killed, and another starts: every caller that
    comes back is answered, and only pairs of the killed ones' calls are inferred twice.
    """  # noqa: D205 - one thought
    proxies = running.start_replicas(3, *FLAGS)
    tally, kills, over = LoadStats(), [], asyncio.Event()
    for turn in range(TIMES):
        loading = asyncio.create_task(
            send_steady_misses([proxy.target for proxy in proxies], over, tally, name=f"kill {turn}")
        )
        await asyncio.sleep(1)
        owner = await find_replica_in_call(running, proxies)
        owner.process.kill()
        kills.append(time.time())
        proxies.remove(owner)
        await asyncio.sleep(1)
        over.set()
        async with asyncio.timeout(60):
            await loading
        over.clear()
        proxies.append(await asyncio.to_thread(running.start_replica, *FLAGS))
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    await _nothing_is_stuck(running)
    calls = running.model_calls
    assert _twice(calls) <= _excused(calls, kills, before=0.4, after=0.1)
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= SEEN_LATE_SECONDS
    )


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_redis_that_is_killed_costs_a_second_of_answers_at_most(running: Fleet) -> None:
    """Ten kills under load, back half a second later with what its log of a second ago had, and a flush:
    every caller is answered, and only what was under way around a kill is inferred twice.
    """  # noqa: D205 - one thought
    proxies = running.start_replicas(3, *FLAGS)
    tally, kills = LoadStats(), []
    async with load(proxies, tally):
        for _ in range(TIMES):
            await asyncio.sleep(2)
            kills.append(time.time())
            await asyncio.to_thread(running.redis.restart_after_crash, downtime_seconds=0.5)
        await asyncio.sleep(2)
        async with redis.asyncio.Redis.from_url(running.redis.url) as client:
            kills.append(time.time())
            await client.flushall()
        await asyncio.sleep(2)
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    await _nothing_is_stuck(running)
    calls = running.model_calls
    assert _twice(calls) <= _excused(calls, kills, before=2.0, after=4.0)
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= SEEN_LATE_SECONDS
    )
    for proxy in proxies:
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_lost_replies_cost_nothing(running: Fleet) -> None:
    """Each replica loses a tenth of its scripts' replies: all callers are answered, no pair is sent twice."""
    wires = [running.open_link() for _ in range(3)]
    proxies = [running.start_replica(*FLAGS, link=wire) for wire in wires]
    for wire in wires:
        wire.reply_loss_ratio = 0.1
    tally = LoadStats()
    async with load(proxies, tally):
        await asyncio.sleep(15)
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    assert sum(wire.lost_replies for wire in wires) > 100
    for wire in wires:
        wire.reply_loss_ratio = 0
    await _nothing_is_stuck(running)
    assert not _twice(running.model_calls)


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_a_redis_that_is_paused_stops_nobody(running: Fleet) -> None:
    """Stopped for ten seconds under load: hits as fast as ever, misses within five seconds, the fleet within
    its limit without a word between replicas; then all return, one warning each for queue and store.
    """  # noqa: D205 - one thought
    proxies = running.start_replicas(3, *FLAGS)
    known, quick, slow, over = make_pairs("known", 100), LoadStats(), LoadStats(), asyncio.Event()
    async with load_callers([[proxy.target] for proxy in proxies], LoadStats()) as each:
        await asyncio.gather(*(caller.infer(known) for caller in each))
    async with load(proxies, slow):
        hitting = [asyncio.create_task(send_hits(proxy.target, known, over, quick)) for proxy in proxies]
        await asyncio.sleep(1)
        running.redis.pause()
        await asyncio.sleep(10)
        running.redis.resume()
        await asyncio.sleep(4)
        over.set()
        await asyncio.gather(*hitting)
    assert (slow.wrong_pairs, slow.errors, quick.wrong_pairs, quick.errors) == ([], [], [], [])
    assert quick.misses == 0
    assert quick.percentile(0.99) <= 0.05
    assert slow.percentile(1.0) <= 5
    calls = running.model_calls
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= SEEN_LATE_SECONDS
    )
    for proxy in proxies:
        assert proxy.log.count("WARNING") == 2
        assert "the shared queue is back" in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_replica_that_is_cut_off_alone_keeps_to_its_own_moments(running: Fleet) -> None:
    """One of three loses Redis for eight seconds: callers are answered, the fleet stays within the limit, and
    it returns by itself.
    """  # noqa: D205 - one thought
    wire = running.open_link()
    proxies = [running.start_replica(*FLAGS, link=wire), *running.start_replicas(2, *FLAGS)]
    tally = LoadStats()
    async with load(proxies, tally):
        await asyncio.sleep(3)
        wire.drop_traffic()
        await asyncio.sleep(8)
        wire.restore()
        await asyncio.sleep(4)
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    assert tally.percentile(1.0) <= 5
    await _nothing_is_stuck(running)
    calls = running.model_calls
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= SEEN_LATE_SECONDS
    )
    assert "the shared queue is back" in proxies[0].log
    assert all("is lost" not in proxy.log for proxy in proxies[1:])


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_two_model_versions_share_one_limit_and_no_answers(running: Fleet) -> None:
    """Two replicas of each, started with rates of their own: each version asks for itself, and all together
    keep to the limit of the newest start.
    """  # noqa: D205 - one thought
    both = [
        *running.start_replicas(2, *FLAGS, "--model-version", "1", "--model-calls-per-second", "20"),
        *running.start_replicas(2, *FLAGS, "--model-version", "2"),
    ]
    tallies = [LoadStats(), LoadStats()]
    over = asyncio.Event()
    loading = [
        asyncio.create_task(send_steady_misses([proxy.target for proxy in pair], over, tally))
        for pair, tally in zip((both[:2], both[2:]), tallies, strict=True)
    ]
    await asyncio.sleep(8)
    over.set()
    await asyncio.gather(*loading)
    for tally in tallies:
        assert (tally.wrong_pairs, tally.errors) == ([], [])
    calls = running.model_calls
    assert max(count_inferences(calls).values()) == 2  # once for each version
    assert _over_seconds(calls) <= SEEN_LATE_SECONDS
    assert "rate limits in Redis differed from this replica's settings" in both[2].log
    assert "(calls/s 20 -> 5)" in both[2].log
