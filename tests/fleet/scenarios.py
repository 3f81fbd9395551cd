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
from tests.support.caller import metrics, pairs_of
from tests.support.fleet import Fleet
from tests.support.load_callers import LoadCaller, Pairs, Tally, cut
from tests.support.processes import Service
from tests.support.redis_server import wait_for

_DICE_SEED = 1
_ON_THE_WAY_MS = (
    120  # by then it has left; who is stopped as it leaves sends when it wakes, whatever was decided
)
_WAITING_BATCHES, _ABOVE_THE_RATE = 3, 1.02  # enough that a batch always waits


@asynccontextmanager
async def callers(targets: Sequence[Sequence[str]], tally: Tally) -> AsyncIterator[list[LoadCaller]]:
    """A caller for each list of targets."""
    opened = [LoadCaller(places, f"caller {number}", tally) for number, places in enumerate(targets)]
    try:
        yield opened
    finally:
        for caller in opened:
            await caller.close()


async def same_pairs(targets: Sequence[str], *, closed: bool) -> Tally:
    """Six callers, two at each of three replicas, ask the same 5,000 pairs, each in an order of its own, in
    RPCs of 1 to 1500 pairs: one after the other (closed loop) or all at once.
    """  # noqa: D205 - one thought
    dice, tally = random.Random(_DICE_SEED), Tally()
    pairs = pairs_of("company", 5000)

    async def run(caller: LoadCaller, batches: Sequence[Pairs]) -> None:
        if not closed:
            await asyncio.gather(*map(caller.ask, batches))
            return
        for batch in batches:
            await caller.ask(batch)

    async with callers([[targets[number % 3]] for number in range(6)], tally) as six:
        work = [list(cut(dice.sample(pairs, len(pairs)), (1, 1500), dice)) for _ in six]
        await asyncio.gather(*map(run, six, work))
    return tally


async def same_pairs_at_once(fleet: Fleet, targets: Sequence[str], pairs: Pairs) -> tuple[Tally, list[str]]:
    """A caller at each replica asks the same pairs in one RPC, all at the same time; what clients sent to
    Redis meanwhile, heartbeats and all.
    """  # noqa: D205 - one thought
    tally = Tally()
    async with callers([[target] for target in targets], tally) as each:
        for number, caller in enumerate(each):  # connects, and lets the limit's first interval pass
            await caller.ask([(f"warm up {number}", "t")])
        with fleet.redis.commands_of_clients() as commands:
            await asyncio.gather(*(caller.ask(pairs) for caller in each))
    return tally, commands


@dataclass(frozen=True, slots=True)
class Paced:
    """What a backlog's calls looked like; `over_seconds` is the most by which a window was too short."""

    calls: int
    fill: float
    rate_used: float
    over_seconds: float
    twice: int
    callers_well: bool


async def backlog_of_single_pairs(fleet: Fleet, *, seconds: float, batch_pairs: int) -> Paced:
    """An open loop of RPCs of one new pair each, at more than a model of one batch a second takes, on four
    replicas: through a kill -9, the start of another, and a SIGSTOP of one whose call is with the model.
    """  # noqa: D205 - one thought
    batch = str(batch_pairs)
    flags = ("--model-deadline", "5s", "--model-rate", batch, "--model-batch-size", batch)
    proxies = fleet.start_all(4, *flags)
    tally = Tally()
    places = [proxy.target for proxy in proxies]
    targets = [places[number:] + places[:number] for number in range(len(places))]
    async with callers(targets, tally) as each, asyncio.TaskGroup() as group:
        group.create_task(_trouble(fleet, proxies, seconds))
        began, sent = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            due = int(batch_pairs * (_WAITING_BATCHES + now * _ABOVE_THE_RATE))
            for number in range(sent, due):
                caller = each[number % len(each)]
                group.create_task(caller.ask([(f"single {number}", "Senior Engineer")]))
            sent = due
            await asyncio.sleep(0.01)
    calls = fleet.calls
    backlogged = [call for call in calls if call.at <= calls[0].at + seconds - _WAITING_BATCHES]
    return Paced(
        calls=len(calls),
        fill=call_log.fill(backlogged, batch_pairs),
        rate_used=call_log.rate_used(backlogged, pairs_per_second=batch_pairs),
        over_seconds=max(call_log.most_over(calls, pairs_per_second=batch_pairs, calls_per_second=1)),
        twice=sum(times > 1 for times in call_log.inferences(calls).values()),
        callers_well=not tally.wrong and not tally.failed and tally.answered == sent,
    )


async def _trouble(fleet: Fleet, proxies: list[Service], seconds: float) -> None:
    await asyncio.sleep(seconds * 0.2)
    proxies.pop().process.kill()
    await asyncio.sleep(seconds * 0.2)
    await asyncio.to_thread(fleet.start, *fleet.flags)
    await asyncio.sleep(seconds * 0.2)
    owner = await owner_of_a_call(fleet, proxies)
    owner.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(seconds * 0.1)
    owner.process.send_signal(signal.SIGCONT)


async def owner_of_a_call(fleet: Fleet, proxies: Sequence[Service]) -> Service:
    """A replica whose call is with the model just now, by the claims in Redis."""
    by_name = {proxy.replica: proxy for proxy in proxies}
    async with asyncio.timeout(30), redis.asyncio.Redis.from_url(fleet.redis.url) as client:
        while True:
            for key in await client.keys("*:claims"):
                for packed in await client.hvals(key):
                    claim = msgpack.unpackb(packed)
                    there = time.time() * 1000 > claim["slot_at"] + _ON_THE_WAY_MS
                    if there and claim["replica"] in by_name:
                        return by_name[claim["replica"]]
            await asyncio.sleep(0.002)


async def steady_misses(
    targets: Sequence[str], over: asyncio.Event, tally: Tally, *, name: str = "steady"
) -> None:
    """Callers, two at each replica, that ask for five new pairs and five that another caller asks for too,
    again and again until `over`.
    """  # noqa: D205 - one thought
    places = list(targets)
    count = 2 * len(places)
    turned = [places[number % len(places) :] + places[: number % len(places)] for number in range(count)]

    async def run(caller: LoadCaller, number: int) -> None:
        for turn in itertools.count():
            if over.is_set():
                return
            pairs = pairs_of(f"{name} {number} {turn}", 5) + pairs_of(f"{name} {number ^ 1} {turn}", 5)
            await caller.ask(pairs, seconds=60)
            await asyncio.sleep(0.02)

    async with callers(turned, tally) as each:
        await asyncio.gather(*(run(caller, number) for number, caller in enumerate(each)))


async def hits(target: str, pairs: Pairs, over: asyncio.Event, tally: Tally) -> None:
    """One caller that asks for pairs that this replica knows, again and again until `over`."""
    async with callers([[target]], tally) as (caller,):
        while not over.is_set():
            await caller.ask(pairs)
            await asyncio.sleep(0.01)


async def small_before_many(fleet: Fleet, *, pairs: int, rounds: int) -> tuple[int, int]:
    """A flood of one bulk caller's pairs at one replica; then, at another, an interactive pair and twenty of
    a small bulk caller's. The place of the call that each was in, counted from when it was asked, at worst:
    0 is the next one.
    """  # noqa: D205 - one thought
    big, other = fleet.start_all(2, "--max-wait", "10m")
    flood, small = Tally(), Tally()
    quick_place = small_place = 0
    async with callers([[big.target]], flood) as (many,), callers([[other.target]] * 2, small) as (one, two):
        flooding = asyncio.create_task(many.ask(pairs_of("flood", pairs), priority="bulk", seconds=600))
        waiting = ("cache_proxy_queue_global_pairs", "bulk")
        await asyncio.to_thread(
            wait_for, lambda: metrics(other.http)[waiting] > 0.9 * pairs, seconds=60, what="the flood waits"
        )
        for _ in range(rounds):
            before = len(fleet.calls)
            quick, few = (f"quick {before}", "CTO"), pairs_of(f"small {before}", 20)
            await asyncio.gather(one.ask([quick]), two.ask(few, priority="bulk"))
            after = fleet.calls[before:]
            quick_place = max(quick_place, *_places(after, [quick]))
            small_place = max(small_place, *_places(after, few))
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
    assert (small.wrong, small.failed) == ([], [])
    return quick_place, small_place


def _places(calls: Sequence[call_log.Call], pairs: Pairs) -> list[int]:
    wanted = set(pairs)
    return [place for place, call in enumerate(calls) if wanted.intersection(call.pairs)]


async def lone_misses(fleet: Fleet, target: str, *, count: int) -> tuple[float, float]:
    """One new pair after the other at a replica, nobody else there, and by turns one at the model itself.
    Seconds that half of them took, through the replica and directly.
    """  # noqa: D205 - one thought
    through, direct = Tally(), Tally()
    async with callers([[target]], through) as (caller,), callers([[fleet.model]], direct) as (other,):
        for number in range(count):
            await caller.ask([(f"lone {number}", "t")])
            await other.ask([(f"direct {number}", "t")])
    assert (through.wrong, through.failed, direct.failed) == ([], [], [])
    return through.percentile(0.5), direct.percentile(0.5)
