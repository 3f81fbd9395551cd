"""Finding the pairs for which the model refuses batches, without taking the model from the others."""

import asyncio
import math
from collections.abc import Set as AbstractSet

import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import PairRejectedError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.interface import Claim, QueueLimits, RequestContext
from services.cache_proxy.queue.managed_queue import create_local_queue

ASKER = RequestContext("anonymous", "interactive", math.inf)


def _pair(number: int) -> Pair:
    return Pair(number.to_bytes(16, "big"), f"c{number}", "t")


class Run:
    """A queue without limits before a model that refuses any batch that holds one of `bad`."""

    def __init__(self, *, pairs: int, batch: int, bad: AbstractSet[int]) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.calls = 0
        self.probes = 0
        self.worst_share = 0.0  # of probes among the calls, while others wait
        self._pairs = [_pair(number) for number in range(pairs)]
        self._batch = batch
        self._bad = bad

    async def play(self) -> "Run":
        """Ask for all pairs, and be the model until nothing waits."""
        queue = create_local_queue(
            QueueLimits(
                batch_pairs=self._batch,
                batch_bytes=10**9,
                pairs_per_second=0,
                calls_per_second=0,
                linger_seconds=0,
                max_pairs=10**9,
                max_bytes=10**12,
            ),
            on_outcome=self._settle,
            metrics=ProxyMetrics(CollectorRegistry()),
        )
        await queue.enqueue(self._pairs, ASKER)
        while isinstance(claim := await queue.claim(), Claim):
            self.calls += 1
            self.probes += claim in queue._bisector._unsent_halves
            if queue._scheduler:
                self.worst_share = max(self.worst_share, (self.probes - 1) / self.calls)
            if any(int.from_bytes(pair.digest, "big") in self._bad for pair in claim.pairs):
                await queue.reject(claim, PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad"), {})
            else:
                await queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        assert (queue._total_bytes, len(queue._entries)) == (0, 0)
        return self

    def _settle(self, digest: bytes, outcome: Outcome) -> None:
        number = int.from_bytes(digest, "big")
        assert number not in self.outcomes
        self.outcomes[number] = outcome


def _judge(run: Run, *, pairs: int, bad: AbstractSet[int]) -> None:
    refused = {number for number, outcome in run.outcomes.items() if isinstance(outcome, PairRejectedError)}
    assert len(run.outcomes) == pairs
    assert refused == bad


@given(st.data(), st.integers(1, 60), st.sampled_from([1, 2, 7, 16, 60]))
def test_any_bad_pairs_are_found_and_the_others_answered(data: st.DataObject, pairs: int, batch: int) -> None:
    """Whichever pairs are bad, exactly those fail, and finding one costs about two calls a halving."""
    bad = data.draw(st.sets(st.integers(0, pairs - 1), max_size=8))
    run = asyncio.run(Run(pairs=pairs, batch=batch, bad=bad).play())
    _judge(run, pairs=pairs, bad=bad)
    halvings = math.ceil(math.log2(batch)) if batch > 1 else 0
    assert run.calls <= math.ceil(pairs / batch) + len(bad) * (2 * halvings + 2)


@pytest.mark.parametrize(
    "bad", [{0}, {999}, {500}, {0, 999}, set(range(0, 1000, 50)), set(range(490, 510))], ids=len
)
async def test_bad_pairs_in_a_full_batch_cost_a_bounded_number_of_calls(bad: set[int]) -> None:
    """One in 1000 costs at most 21 calls, two 32, twenty 260: twenty cost no less by any halving."""
    run = await Run(pairs=1000, batch=1000, bad=bad).play()
    _judge(run, pairs=1000, bad=bad)
    assert run.calls <= {1: 21, 2: 32, 20: 260}[len(bad)]


@pytest.mark.parametrize("bad", [50, 200, 1000])
async def test_many_bad_pairs_cost_no_innocent_an_answer(bad: int) -> None:
    """However many of a batch are bad, what is not is answered."""
    wrong = set(range(0, 1000, 1000 // bad))
    run = await Run(pairs=1000, batch=1000, bad=wrong).play()
    _judge(run, pairs=1000, bad=wrong)


async def test_probes_take_at_most_a_quarter_while_others_wait() -> None:
    """Twenty bad pairs among a backlog of forty batches: three calls of four stay the others'."""
    bad = set(range(0, 100, 5))
    run = await Run(pairs=4000, batch=100, bad=bad).play()
    _judge(run, pairs=4000, bad=bad)
    assert run.probes > 20
    assert run.worst_share <= 0.25


async def test_new_suspects_do_not_starve_older_ones() -> None:
    """While a new bad pair comes with every call, a batch that was refused first is sorted out first."""
    ended: dict[bytes, Outcome] = {}
    limits = QueueLimits(
        batch_pairs=16,
        batch_bytes=10**9,
        pairs_per_second=0,
        calls_per_second=0,
        linger_seconds=0,
        max_pairs=10**9,
        max_bytes=10**12,
    )
    queue = create_local_queue(
        limits, on_outcome=ended.__setitem__, metrics=ProxyMetrics(CollectorRegistry())
    )
    victims = [_pair(number) for number in range(15)]
    await queue.enqueue([*victims, _pair(1000)], ASKER)
    for number in range(1001, 1200):
        claim = await queue.claim()
        assert isinstance(claim, Claim)
        if any(int.from_bytes(pair.digest, "big") >= 1000 for pair in claim.pairs):
            await queue.reject(claim, PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad"), {})
        else:
            await queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        await queue.enqueue([_pair(number), _pair(number + 10_000)], ASKER)
        if all(ended.get(pair.digest) == 3 for pair in victims):
            return
    raise AssertionError(len(ended))
