"""Scenarios: each puts load on a fleet and returns what its callers and the model's call log show."""

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgpack
import redis.asyncio

from tests.support import call_log
from tests.support.caller import make_pairs, read_metrics
from tests.support.fleet import Fleet
from tests.support.load_callers import LoadCaller, LoadStats, Pairs, split_randomly
from tests.support.processes import ServiceProcess
from tests.support.redis_server import wait_for

_SEED = 1
# By then the call has been sent. A replica that is stopped just before sends its call when it is resumed,
# although the fleet may have decided otherwise in the meantime.
_SEND_DELAY_MS = 120
# Enough load that a full batch is always waiting.
_WAITING_BATCHES = 3
_LOAD_TO_RATE = 1.02


@asynccontextmanager
async def load_callers(targets: Sequence[Sequence[str]], stats: LoadStats) -> AsyncIterator[list[LoadCaller]]:
    """Open a caller for each list of targets."""
    opened = [LoadCaller(addresses, f"caller {number}", stats) for number, addresses in enumerate(targets)]
    try:
        yield opened
    finally:
        for caller in opened:
            await caller.close()


async def send_same_pairs(targets: Sequence[str], *, closed_loop: bool) -> LoadStats:
    """Send the same 5,000 pairs from six callers, two at each of three replicas.

    Each caller has its own order and sends RPCs of 1 to 1500 pairs: one after the other (closed loop) or all
    at once.
    """
    rng = random.Random(_SEED)
    stats = LoadStats()
    pairs = make_pairs("company", 5000)

    async def run(caller: LoadCaller, batches: Sequence[Pairs]) -> None:
        if not closed_loop:
            await asyncio.gather(*map(caller.infer, batches))
            return
        for batch in batches:
            await caller.infer(batch)

    async with load_callers([[targets[number % 3]] for number in range(6)], stats) as callers:
        requests = [list(split_randomly(rng.sample(pairs, len(pairs)), (1, 1500), rng)) for _ in callers]
        await asyncio.gather(*map(run, callers, requests))
    return stats


async def send_same_pairs_at_once(
    fleet: Fleet, targets: Sequence[str], pairs: Pairs
) -> tuple[LoadStats, list[str]]:
    """Send the same pairs in one RPC to each replica, all at the same time.

    Return also the commands that clients sent to Redis in the meantime, heartbeats included.
    """
    stats = LoadStats()
    async with load_callers([[target] for target in targets], stats) as callers:
        # Warm up: connect, and let the first interval of the rate limit pass.
        for number, caller in enumerate(callers):
            await caller.infer([(f"warm up {number}", "t")])
        with fleet.redis.record_client_commands() as commands:
            await asyncio.gather(*(caller.infer(pairs) for caller in callers))
    return stats, commands


@dataclass(frozen=True, slots=True)
class BacklogResult:
    """The calls that a backlog caused.

    `max_limit_excess_seconds` is by how much a call came too early, at most.
    """

    calls: int
    fill_ratio: float
    rate_utilization: float
    max_limit_excess_seconds: float
    duplicate_inferences: int
    callers_ok: bool


async def send_single_pair_backlog(fleet: Fleet, *, seconds: float, batch_pairs: int) -> BacklogResult:
    """Send RPCs of one new pair each to four replicas, faster than a model of one batch a second takes them.

    The load is an open loop. In the meantime a replica is killed, another one is started, and a replica whose
    call is at the model is stopped with SIGSTOP.
    """
    batch = str(batch_pairs)
    flags = ("--model-deadline", "5s", "--model-rate", batch, "--model-batch-size", batch)
    proxies = fleet.start_replicas(4, *flags)
    stats = LoadStats()
    addresses = [proxy.target for proxy in proxies]
    targets = [addresses[number:] + addresses[:number] for number in range(len(addresses))]
    async with load_callers(targets, stats) as callers, asyncio.TaskGroup() as group:
        group.create_task(_inject_faults(fleet, proxies, seconds))
        started_at = time.monotonic()
        sent = 0
        while (elapsed := time.monotonic() - started_at) < seconds:
            due = int(batch_pairs * (_WAITING_BATCHES + elapsed * _LOAD_TO_RATE))
            for number in range(sent, due):
                caller = callers[number % len(callers)]
                group.create_task(caller.infer([(f"single {number}", "Senior Engineer")]))
            sent = due
            await asyncio.sleep(0.01)
    calls = fleet.model_calls
    backlogged = [
        call for call in calls if call.unix_seconds <= calls[0].unix_seconds + seconds - _WAITING_BATCHES
    ]
    return BacklogResult(
        calls=len(calls),
        fill_ratio=call_log.fill_ratio(backlogged, batch_pairs),
        rate_utilization=call_log.rate_utilization(backlogged, pairs_per_second=batch_pairs),
        max_limit_excess_seconds=max(
            call_log.max_limit_excess_seconds(calls, pairs_per_second=batch_pairs, calls_per_second=1)
        ),
        duplicate_inferences=sum(times > 1 for times in call_log.count_inferences(calls).values()),
        callers_ok=not stats.wrong_pairs and not stats.errors and stats.answered_pairs == sent,
    )


async def _inject_faults(fleet: Fleet, proxies: list[ServiceProcess], seconds: float) -> None:
    await asyncio.sleep(seconds * 0.2)
    proxies.pop().process.kill()
    await asyncio.sleep(seconds * 0.2)
    await asyncio.to_thread(fleet.start_replica, *fleet.default_flags)
    await asyncio.sleep(seconds * 0.2)
    owner = await find_replica_in_call(fleet, proxies)
    owner.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(seconds * 0.1)
    owner.process.send_signal(signal.SIGCONT)


async def find_replica_in_call(fleet: Fleet, proxies: Sequence[ServiceProcess]) -> ServiceProcess:
    """Return a replica whose call is at the model now, according to the claims in Redis."""
    by_id = {proxy.replica_id: proxy for proxy in proxies}
    async with asyncio.timeout(30), redis.asyncio.Redis.from_url(fleet.redis.url) as client:
        while True:
            for key in await client.keys("*:claims"):
                for packed in await client.hvals(key):
                    claim = msgpack.unpackb(packed)
                    is_sent = time.time() * 1000 > claim["slot_at"] + _SEND_DELAY_MS
                    if is_sent and claim["replica"] in by_id:
                        return by_id[claim["replica"]]
            await asyncio.sleep(0.002)


async def send_steady_misses(
    targets: Sequence[str], stop: asyncio.Event, stats: LoadStats, *, name: str = "steady"
) -> None:
    """Send RPCs with new pairs from two callers at each replica until `stop` is set.

    Of the ten pairs of an RPC five are also sent by another caller.
    """
    count = 2 * len(targets)
    rotated = [
        [*targets[number % len(targets) :], *targets[: number % len(targets)]] for number in range(count)
    ]

    async def run(caller: LoadCaller, number: int) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            pairs = make_pairs(f"{name} {number} {turn}", 5) + make_pairs(f"{name} {number ^ 1} {turn}", 5)
            await caller.infer(pairs, timeout_seconds=60)
            await asyncio.sleep(0.02)

    async with load_callers(rotated, stats) as callers:
        await asyncio.gather(*(run(caller, number) for number, caller in enumerate(callers)))


async def send_hits(target: str, pairs: Pairs, stop: asyncio.Event, stats: LoadStats) -> None:
    """Send pairs that the replica has cached, again and again, until `stop` is set."""
    async with load_callers([[target]], stats) as (caller,):
        while not stop.is_set():
            await caller.infer(pairs)
            await asyncio.sleep(0.01)


async def measure_queue_positions(fleet: Fleet, *, pairs: int, rounds: int) -> tuple[int, int]:
    """Measure how soon new pairs reach the model behind the many bulk pairs of one caller.

    The bulk pairs are sent to one replica. Then another replica gets an interactive pair and twenty pairs of
    a small bulk caller. Return for either the highest position of the calls that contained them, counted from
    the moment of sending: 0 is the next call.
    """
    big, other = fleet.start_replicas(2, "--max-wait", "10m")
    flood_stats = LoadStats()
    small_stats = LoadStats()
    interactive_position = small_position = 0
    async with (
        load_callers([[big.target]], flood_stats) as (flood_caller,),
        load_callers([[other.target]] * 2, small_stats) as (interactive_caller, small_caller),
    ):
        flood = asyncio.create_task(
            flood_caller.infer(make_pairs("flood", pairs), priority="bulk", timeout_seconds=600)
        )
        waiting = ("cache_proxy_queue_global_pairs", "bulk")
        await asyncio.to_thread(
            wait_for,
            lambda: read_metrics(other.http_url)[waiting] > 0.9 * pairs,
            timeout_seconds=60,
            description="the flood waits",
        )
        for _ in range(rounds):
            before = len(fleet.model_calls)
            interactive_pair = (f"quick {before}", "CTO")
            small_pairs = make_pairs(f"small {before}", 20)
            await asyncio.gather(
                interactive_caller.infer([interactive_pair]), small_caller.infer(small_pairs, priority="bulk")
            )
            after = fleet.model_calls[before:]
            interactive_position = max(interactive_position, *_call_positions(after, [interactive_pair]))
            small_position = max(small_position, *_call_positions(after, small_pairs))
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)
    assert (small_stats.wrong_pairs, small_stats.errors) == ([], [])
    return interactive_position, small_position


def _call_positions(calls: Sequence[call_log.LoggedCall], pairs: Pairs) -> list[int]:
    wanted = set(pairs)
    return [position for position, call in enumerate(calls) if wanted.intersection(call.pairs)]


async def measure_lone_misses(fleet: Fleet, target: str, *, count: int) -> tuple[float, float]:
    """Measure the latency of single misses without other load.

    Send one new pair after the other, alternating between the replica and the model itself. Return the median
    seconds through the replica and directly.
    """
    proxy_stats = LoadStats()
    model_stats = LoadStats()
    async with (
        load_callers([[target]], proxy_stats) as (proxy_caller,),
        load_callers([[fleet.model_target]], model_stats) as (model_caller,),
    ):
        for number in range(count):
            await proxy_caller.infer([(f"lone {number}", "t")])
            await model_caller.infer([(f"direct {number}", "t")])
    assert (proxy_stats.wrong_pairs, proxy_stats.errors, model_stats.errors) == ([], [], [])
    return proxy_stats.percentile(0.5), model_stats.percentile(0.5)
