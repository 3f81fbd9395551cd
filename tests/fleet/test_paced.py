"""Paced: under a backlog every call is full, the rate is used, and no window is above the limit."""

import pytest

from tests.fleet.scenarios import backlog_of_single_pairs
from tests.support.fleet import Fleet

pytestmark = pytest.mark.slow

SECONDS = 60
BATCH_PAIRS = 300  # a call a second, so 300 pairs: what two cores bear, with the callers on them too


SEEN_LATE_SECONDS = 0.15
"""A call may be seen so much later than it came where callers, fleet and stub share two cores: what sends too
early is off by far more. The benchmark, alone on the machine, prints the exact figure.
"""

LEAST_USED = 0.96
"""The aim is 0.97, which the benchmark prints. Here one call in sixty that is half a second late, of a fleet
that shares two cores with its callers, is nearly a hundredth: one of four runs had 0.968, the others 0.97.
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_backlog_is_paced_through_deaths_starts_and_pauses(running: Fleet) -> None:
    """Single-pair callers on four replicas, a minute: through a kill -9, a start and an owner's SIGSTOP."""
    figures = await backlog_of_single_pairs(running, seconds=SECONDS, batch_pairs=BATCH_PAIRS)
    assert figures.callers_well
    assert figures.fill >= 0.95
    assert figures.rate_used >= LEAST_USED
    assert figures.over_seconds <= SEEN_LATE_SECONDS
    assert figures.twice <= BATCH_PAIRS  # the killed one's call; the paused one's, past its deadline
