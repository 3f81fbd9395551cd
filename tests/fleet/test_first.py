"""Who goes first: an interactive pair and a small bulk caller before a great many; a lone miss at once."""

import asyncio

import pytest

from tests.fleet.scenarios import callers
from tests.support.caller import metrics, pairs_of
from tests.support.fleet import Fleet
from tests.support.load import Tally
from tests.support.redis_server import wait_for

pytestmark = pytest.mark.slow

CLAIMED_AHEAD = 1
"""A full batch is claimed a moment before its slot, so the next slot's may be on its way already."""


async def test_small_callers_go_before_a_hundred_thousand_pairs(running: Fleet) -> None:
    """With 100,000 bulk pairs of another caller's in the queue, an interactive pair is in the next call, and
    twenty bulk pairs of a small caller's are within the next two, at whatever replica they ask.
    """  # noqa: D205 - one thought
    big, other = running.start_all(2, "--max-wait", "10m")
    tally, small = Tally(), Tally()
    async with callers([[big.target]], tally) as (flood,), callers([[other.target]] * 2, small) as (one, two):
        flooding = asyncio.create_task(flood.ask(pairs_of("flood", 100_000), priority="bulk", seconds=600))
        await asyncio.to_thread(
            wait_for,
            lambda: metrics(other.http)["cache_proxy_queue_global_pairs", "bulk"] > 90_000,
            seconds=60,
            what="the flood waits",
        )
        for _ in range(3):
            before = len(running.calls)
            await asyncio.gather(
                one.ask([(f"quick {before}", "CTO")]),
                two.ask(pairs_of(f"small {before}", 20), priority="bulk"),
            )
            after = running.calls[before:]
            quick = next(
                place for place, call in enumerate(after) if (f"quick {before}", "CTO") in call.pairs
            )
            last = max(
                place
                for place, call in enumerate(after)
                if any(company.startswith(f"small {before}") for company, _ in call.pairs)
            )
            assert quick <= CLAIMED_AHEAD
            assert last <= 1 + CLAIMED_AHEAD
            assert all(len(call.pairs) == 1000 for call in after)
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)
    assert (small.wrong, small.failed) == ([], [])


async def test_a_lone_miss_waits_for_linger_and_model_alone(running: Fleet) -> None:
    """With the limit far away: half of the misses within linger, the model's 200 ms and the way."""
    proxy = running.start("--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "20ms")
    tally = Tally()
    async with callers([[proxy.target]], tally) as (caller,):
        for number in range(40):
            await caller.ask([(f"lone {number}", "t")])
    assert (tally.wrong, tally.failed) == ([], [])
    assert tally.percentile(0.5) <= 0.020 + 0.200 + 0.030  # 5 ms on an idle machine: see `make bench`
