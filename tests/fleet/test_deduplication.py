"""The same pairs from many callers at several replicas: the model infers each pair once, in full calls."""

import pytest

from tests.fleet.scenarios import send_same_pairs, send_same_pairs_at_once
from tests.support.call_log import inferences_per_pair
from tests.support.caller import make_pairs
from tests.support.fleet import Fleet

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.mark.parametrize(
    ("redis_program", "loop"), [("redis", "open"), ("valkey", "closed")], indirect=["redis_program"]
)
async def test_same_pairs_from_many_callers_are_inferred_once(fleet: Fleet, loop: str) -> None:
    """Three replicas and six callers with the same 5,000 pairs cause five full calls and two more at most.

    In a closed loop there may be four more. Each pair is inferred once. A second round causes no call.
    """
    targets = [proxy.target for proxy in fleet.start_replicas(3)]
    for again in (False, True):
        stats = await send_same_pairs(targets, closed_loop=loop == "closed")
        assert (stats.wrong_pairs, stats.errors, stats.answered_pairs) == ([], [], 30_000)
        assert inferences_per_pair(fleet.model_calls) == 1.0
        assert sum(len(call.pairs) for call in fleet.model_calls) == 5000
        assert len(fleet.model_calls) <= 5 + (4 if loop == "closed" else 2)
        assert not (again and stats.misses)


async def test_same_pairs_at_four_replicas_at_once_cause_one_call(fleet: Fleet) -> None:
    """The same 1000 pairs at four replicas at once: one call to the model, at most 50 commands to Redis."""
    targets = [proxy.target for proxy in fleet.start_replicas(4)]
    stats, commands = await send_same_pairs_at_once(fleet, targets, pairs := make_pairs("herd", 1000))
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    assert sorted(fleet.model_calls[-1].pairs) == sorted(pairs)
    assert len(commands) <= 50, commands
