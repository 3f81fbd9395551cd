"""One replica cannot reach the model: the others use the whole rate and serve its callers, too."""

import asyncio
import itertools
from collections.abc import Iterator

import pytest
from grpc import StatusCode

from tests.fleet.scenarios import load_callers
from tests.support.call_log import count_inferences
from tests.support.caller import make_pairs
from tests.support.fleet import Fleet
from tests.support.load_callers import LoadStats
from tests.support.model_server import AbortWith, scripted_model
from tests.support.redis_server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

CALLS_PER_SECOND = 1
BATCH_PAIRS = 200
FLAGS = (
    "--model-calls-per-second",
    str(CALLS_PER_SECOND),
    "--model-rate",
    str(CALLS_PER_SECOND * BATCH_PAIRS),
    "--model-batch-size",
    str(BATCH_PAIRS),
)


@pytest.fixture(params=["connection refused", "errors"])
def dead_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the address of a model that is not there or returns only errors."""
    if request.param == "connection refused":
        yield f"127.0.0.1:{free_port()}"
        return
    with scripted_model(AbortWith(StatusCode.UNAVAILABLE, "unavailable")) as model:
        yield model.target


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_replica_that_cannot_reach_the_model_costs_the_fleet_no_rate(
    fleet: Fleet, dead_target: str
) -> None:
    """With a backlog at all three replicas, the model gets at least 97 % of its rate, without gaps.

    Each caller is answered, those of the broken replica included, also when they are the only ones.
    """
    sound = fleet.start_replicas(2, *FLAGS)
    broken = fleet.start_replica(*FLAGS, "--model-target", dead_target)
    targets = [proxy.target for proxy in (*sound, broken)]
    stats = LoadStats()
    async with load_callers([[target] for target in targets], stats) as callers:
        # The first call fails. It costs a slot if the model returns an error.
        await callers[2].infer([("its first call fails", "t")])
        warm_up = len(fleet.model_calls)
        await asyncio.gather(
            *(caller.infer(make_pairs(f"backlog {number}", 1500)) for number, caller in enumerate(callers))
        )
        calls = fleet.model_calls[warm_up:]
        # Pairs that only the broken replica's callers wait for: the other replicas send them.
        await callers[2].infer(make_pairs("last", 300), max_attempts=1)
    assert (stats.errors, stats.wrong_pairs) == ([], [])
    assert max(count_inferences(calls).values()) == 1
    elapsed_seconds = calls[-1].unix_seconds - calls[0].unix_seconds
    utilization = (
        sum(len(call.pairs) for call in calls[:-1]) / elapsed_seconds / (CALLS_PER_SECOND * BATCH_PAIRS)
    )
    gaps = [later.unix_seconds - call.unix_seconds for call, later in itertools.pairwise(calls)]
    assert utilization >= 0.97, (utilization, max(gaps))
    assert max(gaps) < 1.5 / CALLS_PER_SECOND, max(gaps)
