"""Paced: under a backlog every call is full, the rate is used, and no window is above the limit."""

import pytest

from tests.fleet.scenarios import send_single_pair_backlog
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SECONDS = 90  # a minute, and half of one more: what a kill and a pause cost is not half a hundredth then
BATCH_PAIRS = 300  # a call a second, so 300 pairs: what two cores bear, with the callers on them too


SEEN_LATE_SECONDS = 0.15
"""A call may be seen so much later than it came where callers, fleet and stub share two cores: what sends too
early is off by far more. The benchmark, alone on the machine, prints the exact figure.
"""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_backlog_is_paced_through_deaths_starts_and_pauses(running: Fleet) -> None:
    """Single-pair callers on four replicas, so long: through a kill -9, a start and an owner's SIGSTOP."""
    figures = await send_single_pair_backlog(running, seconds=SECONDS, batch_pairs=BATCH_PAIRS)
    assert figures.callers_ok
    assert figures.fill_ratio >= 0.95
    assert figures.rate_utilization >= 0.97
    assert figures.max_limit_excess_seconds <= SEEN_LATE_SECONDS
    assert (
        figures.duplicate_inferences <= BATCH_PAIRS
    )  # the killed one's call; the paused one's, past its deadline
