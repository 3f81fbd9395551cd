"""Once: whoever asks what, wherever and when, the model infers each pair once, in full calls."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fleet import Fleet, fleet
from tests.support.judge import per_distinct_pair
from tests.support.load import LoadCaller, Tally, cut
from tests.support.caller import pairs_of

pytestmark = pytest.mark.slow


@pytest.fixture
def running(tmp_path: Path, redis_program: str) -> Iterator[Fleet]:
    with fleet(tmp_path, program=redis_program) as started:
        yield started


@pytest.mark.parametrize("loop", ["open", "closed"])
async def test_the_same_pairs_from_many_callers_are_inferred_once(running: Fleet, loop: str) -> None:
    """Three replicas, six callers, the same 5,000 pairs shuffled, RPCs of 1 to 1500 pairs: five calls and two
    (closed loop: four) at most, each pair once; a second round costs nothing.
    """  # noqa: D205 - one thought
    targets = [proxy.target for proxy in running.start_all(3)]
    for _ in range(2):
        await _six_callers(targets, closed=loop == "closed", tally=(tally := Tally()))
        assert (tally.wrong, tally.failed, tally.answered) == ([], [], 30_000)
        calls = running.calls
        assert per_distinct_pair(calls) == 1.0
        assert sum(len(call.pairs) for call in calls) == 5000
        assert len(calls) <= 5 + (4 if loop == "closed" else 2)
    assert tally.misses == 0


async def _six_callers(targets: list[str], *, closed: bool, tally: Tally) -> None:
    dice = random.Random(1)
    pairs = pairs_of("company", 5000)
    callers = [LoadCaller([targets[n % 3]], f"caller {n}", tally) for n in range(6)]

    async def run(caller: LoadCaller, batches: list[list[tuple[str, str]]]) -> None:
        if closed:
            for batch in batches:
                await caller.ask(batch)
        else:
            await asyncio.gather(*(caller.ask(batch) for batch in batches))

    work = [list(cut(dice.sample(pairs, len(pairs)), (1, 1500), dice)) for _ in callers]
    await asyncio.gather(*map(run, callers, work))
    for caller in callers:
        await caller.close()
