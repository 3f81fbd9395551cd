"""Bisection finds the pairs for which the model rejects batches, and leaves most calls to other pairs."""

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

CONTEXT = RequestContext("anonymous", "interactive", math.inf)


def _pair(number: int) -> Pair:
    return Pair(number.to_bytes(16, "big"), f"c{number}", "t")


class BisectionRun:
    """A queue without rate limits, and a model that rejects any batch with one of the `bad` pairs."""

    def __init__(self, *, pairs: int, batch: int, bad: AbstractSet[int]) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.calls = 0
        self.probes = 0
        # The share of probes among all calls while other pairs wait.
        self.worst_share = 0.0
        self._pairs = [_pair(number) for number in range(pairs)]
        self._batch = batch
        self._bad = bad

    async def run(self) -> "BisectionRun":
        """Enqueue all pairs, and answer as the model until nothing waits."""
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
            on_outcome=self._record_outcome,
            metrics=ProxyMetrics(CollectorRegistry()),
        )
        await queue.enqueue(self._pairs, CONTEXT)
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

    def _record_outcome(self, digest: bytes, outcome: Outcome) -> None:
        number = int.from_bytes(digest, "big")
        assert number not in self.outcomes
        self.outcomes[number] = outcome


def _assert_only_bad_pairs_rejected(run: BisectionRun, *, pairs: int, bad: AbstractSet[int]) -> None:
    rejected = {number for number, outcome in run.outcomes.items() if isinstance(outcome, PairRejectedError)}
    assert len(run.outcomes) == pairs
    assert rejected == bad


@given(st.data(), st.integers(1, 60), st.sampled_from([1, 2, 7, 16, 60]))
def test_bisection_rejects_exactly_the_bad_pairs(data: st.DataObject, pairs: int, batch: int) -> None:
    """Exactly the bad pairs fail, and finding one takes about two calls a halving."""
    bad = data.draw(st.sets(st.integers(0, pairs - 1), max_size=8))
    run = asyncio.run(BisectionRun(pairs=pairs, batch=batch, bad=bad).run())
    _assert_only_bad_pairs_rejected(run, pairs=pairs, bad=bad)
    halvings = math.ceil(math.log2(batch)) if batch > 1 else 0
    assert run.calls <= math.ceil(pairs / batch) + len(bad) * (2 * halvings + 2)


@pytest.mark.parametrize(
    "bad", [{0}, {999}, {500}, {0, 999}, set(range(0, 1000, 50)), set(range(490, 510))], ids=len
)
async def test_bad_pairs_in_full_batch_take_bounded_number_of_calls(bad: set[int]) -> None:
    """One bad pair in 1000 takes at most 21 calls, two take 32, twenty take 260."""
    run = await BisectionRun(pairs=1000, batch=1000, bad=bad).run()
    _assert_only_bad_pairs_rejected(run, pairs=1000, bad=bad)
    assert run.calls <= {1: 21, 2: 32, 20: 260}[len(bad)]


@pytest.mark.parametrize("bad", [50, 200, 1000])
async def test_many_bad_pairs_do_not_fail_valid_ones(bad: int) -> None:
    """However many pairs of a batch are bad, all others are answered."""
    wrong = set(range(0, 1000, 1000 // bad))
    run = await BisectionRun(pairs=1000, batch=1000, bad=wrong).run()
    _assert_only_bad_pairs_rejected(run, pairs=1000, bad=wrong)


async def test_probes_take_at_most_a_quarter_of_calls() -> None:
    """With twenty bad pairs and a backlog of forty batches, three of four calls are for other pairs."""
    bad = set(range(0, 100, 5))
    run = await BisectionRun(pairs=4000, batch=100, bad=bad).run()
    _assert_only_bad_pairs_rejected(run, pairs=4000, bad=bad)
    assert run.probes > 20
    assert run.worst_share <= 0.25


async def test_new_suspects_do_not_starve_older_ones() -> None:
    """While a new bad pair comes with every call, the batch that was rejected first is resolved first."""
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
    await queue.enqueue([*victims, _pair(1000)], CONTEXT)
    for number in range(1001, 1200):
        claim = await queue.claim()
        assert isinstance(claim, Claim)
        if any(int.from_bytes(pair.digest, "big") >= 1000 for pair in claim.pairs):
            await queue.reject(claim, PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad"), {})
        else:
            await queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        await queue.enqueue([_pair(number), _pair(number + 10_000)], CONTEXT)
        if all(ended.get(pair.digest) == 3 for pair in victims):
            return
    raise AssertionError(len(ended))
