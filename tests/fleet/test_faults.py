"""Crashes, losses and partitions under load.

There are no wrong answers, no failed callers and no stuck pairs, and the rate limit holds.
"""

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

CALLS_PER_SECOND = 5
BATCH_PAIRS = 200
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
# See `MAX_LIMIT_EXCESS_SECONDS` of test_rate_limit.py. Here a slot is a fifth of a second.
MAX_LIMIT_EXCESS_SECONDS = 0.1
REPETITIONS = 10


@asynccontextmanager
async def load(proxies: Sequence[ServiceProcess], stats: LoadStats) -> AsyncIterator[None]:
    """Put load on replicas within the block. At its end every RPC has ended."""
    stop = asyncio.Event()
    loading = asyncio.create_task(send_steady_misses([proxy.target for proxy in proxies], stop, stats))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(60):
            await loading


async def _wait_until_empty(fleet: Fleet) -> None:
    async with asyncio.timeout(20), redis.asyncio.Redis.from_url(fleet.redis.url) as client:
        kinds = ("pairs", "claims", "claimed", "suspects")
        while any([await client.keys(f"*:{kind}") for kind in kinds]):  # noqa: ASYNC110 - Redis has no event
            await asyncio.sleep(0.1)


def _pairs_near(
    calls: Sequence[LoggedCall], fault_times: Sequence[float], *, before: float, after: float
) -> set[tuple[str, str]]:
    """Return the pairs of calls that arrived within the given seconds before or after one of these times."""
    return {
        pair
        for call in calls
        if any(at - before <= call.unix_seconds <= at + after for at in fault_times)
        for pair in call.pairs
    }


def _limit_excess_seconds(calls: Sequence[LoggedCall]) -> float:
    rate = CALLS_PER_SECOND * BATCH_PAIRS
    return max(max_limit_excess_seconds(calls, pairs_per_second=rate, calls_per_second=CALLS_PER_SECOND))


def _duplicates(calls: Sequence[LoggedCall]) -> set[tuple[str, str]]:
    return {pair for pair, times in count_inferences(calls).items() if times > 1}


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_killed_replicas_cause_duplicates_of_their_own_calls_only(fleet: Fleet) -> None:
    """Ten times the replica whose call is at the model is killed and another one is started.

    Each caller that retries is answered. Only pairs of the killed replicas' calls are inferred twice.
    """
    proxies = fleet.start_replicas(3, *FLAGS)
    stats = LoadStats()
    kills = []
    stop = asyncio.Event()
    for turn in range(REPETITIONS):
        loading = asyncio.create_task(
            send_steady_misses([proxy.target for proxy in proxies], stop, stats, name=f"kill {turn}")
        )
        await asyncio.sleep(1)
        owner = await find_replica_in_call(fleet, proxies)
        owner.process.kill()
        kills.append(time.time())
        proxies.remove(owner)
        await asyncio.sleep(1)
        stop.set()
        async with asyncio.timeout(60):
            await loading
        stop.clear()
        proxies.append(await asyncio.to_thread(fleet.start_replica, *FLAGS))
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    await _wait_until_empty(fleet)
    calls = fleet.model_calls
    assert _duplicates(calls) <= _pairs_near(calls, kills, before=0.4, after=0.1)
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= MAX_LIMIT_EXCESS_SECONDS
    )


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_killed_redis_causes_duplicates_around_each_kill_only(fleet: Fleet) -> None:
    """Redis is killed ten times and flushed once, under load.

    It returns after half a second with its log, in which the last second may be missing. Each caller is
    answered, and only pairs that were in flight around a kill are inferred twice.
    """
    proxies = fleet.start_replicas(3, *FLAGS)
    stats = LoadStats()
    kills = []
    async with load(proxies, stats):
        for _ in range(REPETITIONS):
            await asyncio.sleep(2)
            kills.append(time.time())
            await asyncio.to_thread(fleet.redis.restart_after_crash, downtime_seconds=0.5)
        await asyncio.sleep(2)
        async with redis.asyncio.Redis.from_url(fleet.redis.url) as client:
            kills.append(time.time())
            await client.flushall()
        await asyncio.sleep(2)
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    await _wait_until_empty(fleet)
    calls = fleet.model_calls
    assert _duplicates(calls) <= _pairs_near(calls, kills, before=2.0, after=4.0)
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= MAX_LIMIT_EXCESS_SECONDS
    )
    for proxy in proxies:
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_lost_replies_cause_no_duplicate(fleet: Fleet) -> None:
    """Each replica loses a tenth of its scripts' replies: all callers are answered, no pair is sent twice."""
    links = [fleet.open_link() for _ in range(3)]
    proxies = [fleet.start_replica(*FLAGS, link=link) for link in links]
    for link in links:
        link.reply_loss_ratio = 0.1
    stats = LoadStats()
    async with load(proxies, stats):
        await asyncio.sleep(15)
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    assert sum(link.lost_replies for link in links) > 100
    for link in links:
        link.reply_loss_ratio = 0
    await _wait_until_empty(fleet)
    assert not _duplicates(fleet.model_calls)


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_paused_redis_fails_no_caller(fleet: Fleet) -> None:
    """Redis is stopped for ten seconds under load.

    Hits are as fast as before, and misses are answered within five seconds. The fleet keeps the rate limit
    without communication between replicas. Then all replicas return; each logs one warning for the queue and
    one for the store.
    """
    proxies = fleet.start_replicas(3, *FLAGS)
    known = make_pairs("known", 100)
    hit_stats = LoadStats()
    miss_stats = LoadStats()
    stop = asyncio.Event()
    async with load_callers([[proxy.target] for proxy in proxies], LoadStats()) as callers:
        await asyncio.gather(*(caller.infer(known) for caller in callers))
    async with load(proxies, miss_stats):
        hitting = [asyncio.create_task(send_hits(proxy.target, known, stop, hit_stats)) for proxy in proxies]
        await asyncio.sleep(1)
        fleet.redis.pause()
        await asyncio.sleep(10)
        fleet.redis.resume()
        await asyncio.sleep(4)
        stop.set()
        await asyncio.gather(*hitting)
    assert (miss_stats.wrong_pairs, miss_stats.errors, hit_stats.wrong_pairs, hit_stats.errors) == (
        [],
        [],
        [],
        [],
    )
    assert hit_stats.misses == 0
    assert hit_stats.percentile(0.99) <= 0.05
    assert miss_stats.percentile(1.0) <= 5
    calls = fleet.model_calls
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= MAX_LIMIT_EXCESS_SECONDS
    )
    for proxy in proxies:
        assert proxy.log.count("WARNING") == 2
        assert "the shared queue is back" in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_partitioned_replica_keeps_to_its_own_time_slots(fleet: Fleet) -> None:
    """One of three replicas loses Redis for eight seconds.

    Callers are answered, the fleet keeps the rate limit, and the replica returns without help.
    """
    link = fleet.open_link()
    proxies = [fleet.start_replica(*FLAGS, link=link), *fleet.start_replicas(2, *FLAGS)]
    stats = LoadStats()
    async with load(proxies, stats):
        await asyncio.sleep(3)
        link.drop_traffic()
        await asyncio.sleep(8)
        link.restore()
        await asyncio.sleep(4)
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    assert stats.percentile(1.0) <= 5
    await _wait_until_empty(fleet)
    calls = fleet.model_calls
    assert (
        max(max_limit_excess_seconds(calls, pairs_per_second=1000, calls_per_second=CALLS_PER_SECOND))
        <= MAX_LIMIT_EXCESS_SECONDS
    )
    assert "the shared queue is back" in proxies[0].log
    assert all("is lost" not in proxy.log for proxy in proxies[1:])


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_two_model_versions_share_the_limit_but_no_answers(fleet: Fleet) -> None:
    """Two replicas of each version are started with different rates.

    Each version infers a pair once, and all together keep the limit of the replica that started last.
    """
    replicas = [
        *fleet.start_replicas(2, *FLAGS, "--model-version", "1", "--model-calls-per-second", "20"),
        *fleet.start_replicas(2, *FLAGS, "--model-version", "2"),
    ]
    all_stats = [LoadStats(), LoadStats()]
    stop = asyncio.Event()
    loading = [
        asyncio.create_task(send_steady_misses([proxy.target for proxy in group], stop, stats))
        for group, stats in zip((replicas[:2], replicas[2:]), all_stats, strict=True)
    ]
    await asyncio.sleep(8)
    stop.set()
    await asyncio.gather(*loading)
    for stats in all_stats:
        assert (stats.wrong_pairs, stats.errors) == ([], [])
    calls = fleet.model_calls
    # Once for each version.
    assert max(count_inferences(calls).values()) == 2
    assert _limit_excess_seconds(calls) <= MAX_LIMIT_EXCESS_SECONDS
    assert "rate limits in Redis differed from this replica's settings" in replicas[2].log
    assert "(calls/s 20 -> 5)" in replicas[2].log
