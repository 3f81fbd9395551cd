"""Who goes first: an interactive pair and a small bulk caller before a great many; a lone miss at once."""

import pytest

from tests.fleet.scenarios import measure_lone_misses, measure_queue_positions
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CLAIMED_AHEAD = 1
"""A full batch is claimed a moment before its slot, so the next slot's may be on its way already."""


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_small_callers_go_before_a_hundred_thousand_pairs(running: Fleet) -> None:
    """With 100,000 bulk pairs of another caller's in the queue, an interactive pair is in the next call, and
    twenty bulk pairs of a small caller's are within the next two, at whatever replica they ask.
    """  # noqa: D205 - one thought
    quick, small = await measure_queue_positions(running, pairs=100_000, rounds=3)
    assert quick <= CLAIMED_AHEAD
    assert small <= 1 + CLAIMED_AHEAD
    assert all(len(call.pairs) == 1000 for call in running.model_calls)


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_lone_miss_waits_for_linger_and_model_alone(running: Fleet) -> None:
    """With the limit far away: half of the misses within linger, what the model itself takes, and the way."""
    proxy = running.start_replica(
        "--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "20ms"
    )
    through, direct = await measure_lone_misses(running, proxy.target, count=40)
    assert through <= direct + 0.020 + 0.030  # 5 ms on an idle machine: see `make bench`
