"""Scenarios: each sets a fleet to work and returns what its callers and the model's own log say."""

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
_SEND_DELAY_MS = (
    120  # by then it has left; who is stopped as it leaves sends when it wakes, whatever was decided
)
_WAITING_BATCHES, _ABOVE_THE_RATE = 3, 1.02  # enough that a batch always waits


@asynccontextmanager
async def load_callers(targets: Sequence[Sequence[str]], stats: LoadStats) -> AsyncIterator[list[LoadCaller]]:
    """A caller for each list of targets."""
    opened = [LoadCaller(places, f"caller {number}", stats) for number, places in enumerate(targets)]
    try:
        yield opened
    finally:
        for caller in opened:
            await caller.close()


async def send_same_pairs(targets: Sequence[str], *, closed_loop: bool) -> LoadStats:
    """Six callers, two at each of three replicas, ask the same 5,000 pairs, each in an order of its own, in
    RPCs of 1 to 1500 pairs: one after the other (closed loop) or all at once.
    """  # noqa: D205 - one thought
    dice, tally = random.Random(_SEED), LoadStats()
    pairs = make_pairs("company", 5000)

    async def run(caller: LoadCaller, batches: Sequence[Pairs]) -> None:
        if not closed_loop:
            await asyncio.gather(*map(caller.infer, batches))
            return
        for batch in batches:
            await caller.infer(batch)

    async with load_callers([[targets[number % 3]] for number in range(6)], tally) as six:
        work = [list(split_randomly(dice.sample(pairs, len(pairs)), (1, 1500), dice)) for _ in six]
        await asyncio.gather(*map(run, six, work))
    return tally


async def send_same_pairs_at_once(
    fleet: Fleet, targets: Sequence[str], pairs: Pairs
) -> tuple[LoadStats, list[str]]:
    """A caller at each replica asks the same pairs in one RPC, all at the same time; what clients sent to
    Redis meanwhile, heartbeats and all.
    """  # noqa: D205 - one thought
    tally = LoadStats()
    async with load_callers([[target] for target in targets], tally) as each:
        for number, caller in enumerate(each):  # connects, and lets the limit's first interval pass
            await caller.infer([(f"warm up {number}", "t")])
        with fleet.redis.record_client_commands() as commands:
            await asyncio.gather(*(caller.infer(pairs) for caller in each))
    return tally, commands


@dataclass(frozen=True, slots=True)
class BacklogResult:
    """What a backlog's calls looked like; `over_seconds` is the most by which a window was too short."""

    calls: int
    fill_ratio: float
    rate_utilization: float
    max_limit_excess_seconds: float
    duplicate_inferences: int
    callers_ok: bool


async def send_single_pair_backlog(fleet: Fleet, *, seconds: float, batch_pairs: int) -> BacklogResult:
    """An open loop of RPCs of one new pair each, at more than a model of one batch a second takes, on four
    replicas: through a kill -9, the start of another, and a SIGSTOP of one whose call is with the model.
    """  # noqa: D205 - one thought
    batch = str(batch_pairs)
    flags = ("--model-deadline", "5s", "--model-rate", batch, "--model-batch-size", batch)
    proxies = fleet.start_replicas(4, *flags)
    tally = LoadStats()
    places = [proxy.target for proxy in proxies]
    targets = [places[number:] + places[:number] for number in range(len(places))]
    async with load_callers(targets, tally) as each, asyncio.TaskGroup() as group:
        group.create_task(_inject_faults(fleet, proxies, seconds))
        began, sent = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            due = int(batch_pairs * (_WAITING_BATCHES + now * _ABOVE_THE_RATE))
            for number in range(sent, due):
                caller = each[number % len(each)]
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
        callers_ok=not tally.wrong_pairs and not tally.errors and tally.answered_pairs == sent,
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
    """A replica whose call is with the model just now, by the claims in Redis."""
    by_name = {proxy.replica_id: proxy for proxy in proxies}
    async with asyncio.timeout(30), redis.asyncio.Redis.from_url(fleet.redis.url) as client:
        while True:
            for key in await client.keys("*:claims"):
                for packed in await client.hvals(key):
                    claim = msgpack.unpackb(packed)
                    there = time.time() * 1000 > claim["slot_at"] + _SEND_DELAY_MS
                    if there and claim["replica"] in by_name:
                        return by_name[claim["replica"]]
            await asyncio.sleep(0.002)


async def send_steady_misses(
    targets: Sequence[str], stop: asyncio.Event, stats: LoadStats, *, name: str = "steady"
) -> None:
    """Callers, two at each replica, that ask for five new pairs and five that another caller asks for too,
    again and again until `over`.
    """  # noqa: D205 - one thought
    places = list(targets)
    count = 2 * len(places)
    turned = [places[number % len(places) :] + places[: number % len(places)] for number in range(count)]

    async def run(caller: LoadCaller, number: int) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            pairs = make_pairs(f"{name} {number} {turn}", 5) + make_pairs(f"{name} {number ^ 1} {turn}", 5)
            await caller.infer(pairs, timeout_seconds=60)
            await asyncio.sleep(0.02)

    async with load_callers(turned, stats) as each:
        await asyncio.gather(*(run(caller, number) for number, caller in enumerate(each)))


async def send_hits(target: str, pairs: Pairs, stop: asyncio.Event, stats: LoadStats) -> None:
    """One caller that asks for pairs that this replica knows, again and again until `over`."""
    async with load_callers([[target]], stats) as (caller,):
        while not stop.is_set():
            await caller.infer(pairs)
            await asyncio.sleep(0.01)


async def measure_queue_positions(fleet: Fleet, *, pairs: int, rounds: int) -> tuple[int, int]:
    """A flood of one bulk caller's pairs at one replica; then, at another, an interactive pair and twenty of
    a small bulk caller's. The place of the call that each was in, counted from when it was asked, at worst:
    0 is the next one.
    """  # noqa: D205 - one thought
    big, other = fleet.start_replicas(2, "--max-wait", "10m")
    flood, small = LoadStats(), LoadStats()
    quick_place = small_place = 0
    async with (
        load_callers([[big.target]], flood) as (many,),
        load_callers([[other.target]] * 2, small) as (one, two),
    ):
        flooding = asyncio.create_task(
            many.infer(make_pairs("flood", pairs), priority="bulk", timeout_seconds=600)
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
            quick, few = (f"quick {before}", "CTO"), make_pairs(f"small {before}", 20)
            await asyncio.gather(one.infer([quick]), two.infer(few, priority="bulk"))
            after = fleet.model_calls[before:]
            quick_place = max(quick_place, *_call_positions(after, [quick]))
            small_place = max(small_place, *_call_positions(after, few))
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
    assert (small.wrong_pairs, small.errors) == ([], [])
    return quick_place, small_place


def _call_positions(calls: Sequence[call_log.LoggedCall], pairs: Pairs) -> list[int]:
    wanted = set(pairs)
    return [place for place, call in enumerate(calls) if wanted.intersection(call.pairs)]


async def measure_lone_misses(fleet: Fleet, target: str, *, count: int) -> tuple[float, float]:
    """One new pair after the other at a replica, nobody else there, and by turns one at the model itself.
    Seconds that half of them took, through the replica and directly.
    """  # noqa: D205 - one thought
    through, direct = LoadStats(), LoadStats()
    async with (
        load_callers([[target]], through) as (caller,),
        load_callers([[fleet.model_target]], direct) as (other,),
    ):
        for number in range(count):
            await caller.infer([(f"lone {number}", "t")])
            await other.infer([(f"direct {number}", "t")])
    assert (through.wrong_pairs, through.errors, direct.errors) == ([], [], [])
    return through.percentile(0.5), direct.percentile(0.5)
