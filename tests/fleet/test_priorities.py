"""Priorities: interactive pairs and small bulk callers overtake a large backlog; a lone miss goes at once."""

import pytest

from tests.fleet.scenarios import measure_lone_misses, measure_queue_positions
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.alone]

CLAIMED_AHEAD = 1
"""A full batch is claimed shortly before its slot, so the batch for the next slot may already be claimed."""


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_small_callers_overtake_a_backlog_of_100000_pairs(fleet: Fleet) -> None:
    """With 100,000 bulk pairs of one caller in the queue, an interactive pair is in the next call.

    Twenty bulk pairs of a small caller are within the next two calls. This holds at each replica.
    """
    interactive, small = await measure_queue_positions(fleet, pairs=100_000, rounds=3)
    assert interactive <= CLAIMED_AHEAD
    assert small <= 1 + CLAIMED_AHEAD
    assert all(len(call.pairs) == 1000 for call in fleet.model_calls)


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_lone_miss_takes_linger_and_model_latency(fleet: Fleet) -> None:
    """Without a rate limit the median miss takes linger, the model's latency and 30 ms at most."""
    proxy = fleet.start_replica(
        "--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "20ms"
    )
    through, direct = await measure_lone_misses(fleet, proxy.target, count=40)
    # On an idle machine it is 5 ms instead of 30 ms, as `make bench` shows.
    assert through <= direct + 0.020 + 0.030
