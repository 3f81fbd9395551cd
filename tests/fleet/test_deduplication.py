"""Once and full: whoever asks what, wherever and when, the model infers each pair once, in full calls."""

import pytest

from tests.fleet.scenarios import send_same_pairs, send_same_pairs_at_once
from tests.support.call_log import inferences_per_pair
from tests.support.caller import make_pairs
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.mark.parametrize(
    ("redis_program", "loop"), [("redis", "open"), ("valkey", "closed")], indirect=["redis_program"]
)
async def test_the_same_pairs_from_many_callers_are_inferred_once(running: Fleet, loop: str) -> None:
    """Three replicas, six callers, the same 5,000 pairs: five calls and two (closed loop: four) at most, each
    pair once; a second round costs nothing.
    """  # noqa: D205 - one thought
    targets = [proxy.target for proxy in running.start_replicas(3)]
    for again in (False, True):
        tally = await send_same_pairs(targets, closed_loop=loop == "closed")
        assert (tally.wrong_pairs, tally.errors, tally.answered_pairs) == ([], [], 30_000)
        assert inferences_per_pair(running.model_calls) == 1.0
        assert sum(len(call.pairs) for call in running.model_calls) == 5000
        assert len(running.model_calls) <= 5 + (4 if loop == "closed" else 2)
        assert not (again and tally.misses)


async def test_four_processes_that_ask_the_same_at_once_cost_one_call(running: Fleet) -> None:
    """The same 1000 pairs at four replicas at once: one call to the model, 50 commands to Redis at most."""
    targets = [proxy.target for proxy in running.start_replicas(4)]
    tally, commands = await send_same_pairs_at_once(running, targets, pairs := make_pairs("herd", 1000))
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    assert sorted(running.model_calls[-1].pairs) == sorted(pairs)
    assert len(commands) <= 50, commands
