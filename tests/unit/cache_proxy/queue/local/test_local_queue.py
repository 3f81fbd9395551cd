"""The local queue and its waiters as a random state machine."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import (
    InvalidModelResponseError,
    ModelUnavailableError,
    PairRejectedError,
    QueueFullError,
)
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.interface import Claim, ClaimDeferred, QueueLimits, RequestContext
from services.cache_proxy.queue.local.local_queue import LocalQueue
from services.cache_proxy.queue.managed_queue import create_local_queue
from services.cache_proxy.queue.waiters import Waiter, WaiterRegistry

LIMITS = QueueLimits(
    batch_pairs=4,
    batch_bytes=10**6,
    pairs_per_second=0,
    calls_per_second=0,
    linger_seconds=0,
    max_pairs=20,
    max_bytes=10**6,
)
PAIRS = [Pair(bytes([number]) * 16, "c" * number, f"t{number}") for number in range(10)]
OUTCOMES: st.SearchStrategy[Outcome] = st.sampled_from([1, 7, InvalidModelResponseError("none")])
DOWN = ModelUnavailableError("down", retry_after_seconds=0.0)


def _make_queue(limits: QueueLimits, on_outcome: Callable[[bytes, Outcome], None]) -> LocalQueue:
    return create_local_queue(limits, on_outcome=on_outcome, metrics=ProxyMetrics(CollectorRegistry()))


class LocalQueueMachine:
    """Drives a queue as callers and a dispatcher do, one random step at a time.

    `check` holds after each step.
    """

    def __init__(self, data: st.DataObject) -> None:
        self._draw = data.draw
        self._waiters = WaiterRegistry()
        self._queue = _make_queue(LIMITS, self._on_outcome)
        self._open_waiters: list[Waiter] = []
        self._claims: list[Claim] = []

    def _on_outcome(self, digest: bytes, outcome: Outcome) -> None:
        assert digest not in self._queue._entries, "ended, but still in the queue"
        self._waiters.resolve(digest, outcome)

    async def enqueue(self) -> None:
        """Enqueue pairs as the resolver does."""
        pairs = self._draw(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=8, unique=True))
        # Each request makes its own objects.
        pairs = [replace(pair) for pair in pairs]
        waiter = self._waiters.register([pair.digest for pair in pairs])
        context = RequestContext("c", self._draw(st.sampled_from(["interactive", "bulk"])), math.inf)
        before = set(self._queue._entries)
        try:
            enqueued = await self._queue.enqueue(pairs, context)
        except QueueFullError:
            assert set(self._queue._entries) == before
            await self._queue.cancel(self._waiters.unregister(waiter))
            return
        assert enqueued.queued == {pair.digest for pair in pairs} - before - set(enqueued.outcomes)
        self._waiters.resolve_one(waiter, enqueued.outcomes.items())
        self._open_waiters.append(waiter)

    async def cancel(self) -> None:
        """Cancel a request, whether it was answered or not."""
        if self._open_waiters:
            waiter = self._open_waiters.pop(self._draw(st.integers(0, len(self._open_waiters) - 1)))
            await self._queue.cancel(self._waiters.unregister(waiter))

    async def claim(self) -> None:
        """Claim a batch as the dispatcher does."""
        claim = await self._queue.claim()
        if isinstance(claim, ClaimDeferred):
            return
        digests = [pair.digest for pair in claim.pairs]
        assert 0 < len(digests) == len(set(digests)) <= LIMITS.batch_pairs
        sent = {pair.digest for other in self._claims for pair in other.pairs if self._is_held(pair)}
        assert not sent & set(digests), "in two batches"
        awaited = {digest for waiter in self._open_waiters for digest in waiter.pending}
        assert set(digests) <= awaited, "sent while no request waits for it"
        self._claims.append(claim)

    async def finish_claim(self) -> None:
        """End a claimed batch in one of the possible ways."""
        if not self._claims:
            return
        claim = self._claims.pop(self._draw(st.integers(0, len(self._claims) - 1)))
        how = self._draw(
            st.sampled_from(["complete", "release", "fail", "reject all", "reject one", "complete some"])
        )
        if how in {"complete", "complete some"}:
            outcomes: dict[bytes, Outcome] = {pair.digest: self._draw(OUTCOMES) for pair in claim.pairs}
            # Some are found in the store before the rest is sent or released.
            if how == "complete some":
                first = dict(list(outcomes.items())[: len(outcomes) // 2])
                await self._queue.complete(claim, first)
                await self.check([claim])
                self._claims.append(claim)
                return
            await self._queue.complete(claim, outcomes)
        elif how == "release":
            await self._queue.release(claim)
        elif how == "fail":
            await self._queue.fail(claim, DOWN, retry_after_seconds=0)
        else:
            rejection = PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad")
            errors_by_digest = {claim.pairs[0].digest: rejection} if how == "reject one" else {}
            await self._queue.reject(claim, rejection, errors_by_digest)

    async def drain(self) -> None:
        """Answer everything that is left, and check that nothing remains."""
        for claim in self._claims:
            await self._queue.release(claim)
        self._claims.clear()
        while isinstance(taken := await self._queue.claim(), Claim):
            await self._queue.complete(taken, {pair.digest: 3 for pair in taken.pairs})
        assert all(not waiter.pending for waiter in self._open_waiters), "a caller waits forever"
        assert self._queue._entries == {}
        assert (
            self._queue._total_bytes,
            self._queue._scheduler.size_bytes,
            len(self._queue._scheduler),
        ) == (
            0,
            0,
            0,
        )
        assert not self._queue._bisector._groups
        assert not self._queue._bisector._unsent_halves
        assert not self._waiters._by_digest

    async def check(self, extra: list[Claim] | None = None) -> None:
        """Check that every unfinished pair is in exactly one place.

        Every waiter has its pairs there.
        """
        queue = self._queue
        bisector = queue._bisector
        pairs = [entry.pair for entry in queue._scheduler.entries()]
        pairs += [entry.pair for group in bisector._groups for entry in group]
        pairs += [entry.pair for group in bisector._unsent_halves.values() for entry in group]
        pairs += [
            pair for claim in [*self._claims, *(extra or [])] for pair in claim.pairs if self._is_held(pair)
        ]
        assert sorted(map(id, pairs)) == sorted(id(entry.pair) for entry in queue._entries.values())
        assert queue._total_bytes == sum(pair.size_bytes for pair in pairs)
        assert queue._scheduler.size_bytes == sum(
            entry.pair.size_bytes for entry in queue._scheduler.entries()
        )
        assert {digest for waiter in self._open_waiters for digest in waiter.pending} <= set(queue._entries)
        assert all(group for group in bisector._groups)

    def _is_held(self, pair: Pair) -> bool:
        entry = self._queue._entries.get(pair.digest)
        return entry is not None and entry.pair is pair


async def _run_machine(data: st.DataObject) -> None:
    machine = LocalQueueMachine(data)
    steps = [
        machine.enqueue,
        machine.enqueue,
        machine.cancel,
        machine.claim,
        machine.claim,
        machine.finish_claim,
    ]
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=40)):
        await step()
        await machine.check()
    await machine.drain()


@settings(max_examples=300)
@given(st.data())
def test_every_pair_ends_once_for_each_waiting_request(data: st.DataObject) -> None:
    """Through any order of steps no pair is lost, in two pairs, or sent while no request waits.

    All bytes are accounted for at the end.
    """
    asyncio.run(_run_machine(data))
