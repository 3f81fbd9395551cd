"""One replica cannot reach the model: the others keep the rate, and answer its callers too."""

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
from tests.support.model_server import AbortCallError, Answers, ReceivedCall, scripted_model
from tests.support.redis_server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(240)]

CALLS_PER_SECOND, BATCH_PAIRS = 1, 200
FLAGS = (
    "--model-calls-per-second",
    str(CALLS_PER_SECOND),
    "--model-rate",
    str(CALLS_PER_SECOND * BATCH_PAIRS),
    "--model-batch-size",
    str(BATCH_PAIRS),
)


def _always(_call: ReceivedCall) -> Answers:
    raise AbortCallError(StatusCode.UNAVAILABLE, "not me")


@pytest.fixture(params=["nobody listens", "it answers errors"])
def dead_target(request: pytest.FixtureRequest) -> Iterator[str]:
    """A model that is none."""
    if request.param == "nobody listens":
        yield f"127.0.0.1:{free_port()}"
        return
    with scripted_model(_always) as model:
        yield model.target


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_a_replica_that_cannot_reach_the_model_costs_the_fleet_no_rate(
    running: Fleet, dead_target: str
) -> None:
    """With a backlog at all three, the model gets at least 97 % of its rate, without gaps. Every caller is
    answered, those of the broken replica too, also when only they are left.
    """  # noqa: D205 - one thought
    sound = running.start_replicas(2, *FLAGS)
    broken = running.start_replica(*FLAGS, "--model-target", dead_target)
    targets, tally = [proxy.target for proxy in (*sound, broken)], LoadStats()
    async with load_callers([[target] for target in targets], tally) as each:
        await each[2].infer(
            [("its first call fails", "t")]
        )  # which costs a slot if errors come from somewhere
        warm_up = len(running.model_calls)
        await asyncio.gather(
            *(caller.infer(make_pairs(f"backlog {number}", 1500)) for number, caller in enumerate(each))
        )
        calls = running.model_calls[warm_up:]
        await each[2].infer(
            make_pairs("last", 300), max_attempts=1
        )  # its own callers alone: the others send them
    assert (tally.errors, tally.wrong_pairs) == ([], [])
    assert max(count_inferences(calls).values()) == 1
    lasted = calls[-1].unix_seconds - calls[0].unix_seconds
    used = sum(len(call.pairs) for call in calls[:-1]) / lasted / (CALLS_PER_SECOND * BATCH_PAIRS)
    gaps = [later.unix_seconds - call.unix_seconds for call, later in itertools.pairwise(calls)]
    assert used >= 0.97, (used, max(gaps))
    assert max(gaps) < 1.5 / CALLS_PER_SECOND, max(gaps)
