"""The local queue and its waiters against a simple account of who waits for what."""

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


def _queue(limits: QueueLimits, settle: Callable[[bytes, Outcome], None]) -> LocalQueue:
    return create_local_queue(limits, on_outcome=settle, metrics=ProxyMetrics(CollectorRegistry()))


class Play:
    """Callers and a dispatcher around a queue, one step at a time; `check` holds after each."""

    def __init__(self, data: st.DataObject) -> None:
        self._draw = data.draw
        self._waiters = WaiterRegistry()
        self._queue = _queue(LIMITS, self._settle)
        self._waits: list[Waiter] = []
        self._claims: list[Claim] = []
        self.settled: list[bytes] = []

    def _settle(self, digest: bytes, outcome: Outcome) -> None:
        assert digest not in self._queue._entries, "ended, yet still held"
        self._waiters.resolve(digest, outcome)

    async def ask(self) -> None:
        """A caller asks, exactly as the resolver does."""
        pairs = self._draw(st.lists(st.sampled_from(PAIRS), min_size=1, max_size=8, unique=True))
        pairs = [replace(pair) for pair in pairs]  # each request makes its own
        wait = self._waiters.register([pair.digest for pair in pairs])
        asker = RequestContext("c", self._draw(st.sampled_from(["interactive", "bulk"])), math.inf)
        before = set(self._queue._entries)
        try:
            enqueued = await self._queue.enqueue(pairs, asker)
        except QueueFullError:
            assert set(self._queue._entries) == before
            await self._queue.cancel(self._waiters.unregister(wait))
            return
        assert enqueued.queued == {pair.digest for pair in pairs} - before - set(enqueued.outcomes)
        self._waiters.resolve_one(wait, enqueued.outcomes.items())
        self._waits.append(wait)

    async def leave(self) -> None:
        """A caller goes, answered or not."""
        if self._waits:
            wait = self._waits.pop(self._draw(st.integers(0, len(self._waits) - 1)))
            await self._queue.cancel(self._waiters.unregister(wait))

    async def claim(self) -> None:
        """The dispatcher takes a batch."""
        claim = await self._queue.claim()
        if isinstance(claim, ClaimDeferred):
            return
        digests = [pair.digest for pair in claim.pairs]
        assert 0 < len(digests) == len(set(digests)) <= LIMITS.batch_pairs
        in_flight = {pair.digest for other in self._claims for pair in other.pairs if self._is_held(pair)}
        assert not in_flight & set(digests), "in two batches at once"
        wanted = {digest for wait in self._waits for digest in wait.pending}
        assert set(digests) <= wanted, "sent though nobody waits for it"
        self._claims.append(claim)

    async def end(self) -> None:
        """A batch ends in one of the ways in which batches end."""
        if not self._claims:
            return
        claim = self._claims.pop(self._draw(st.integers(0, len(self._claims) - 1)))
        how = self._draw(st.sampled_from(["fulfil", "put back", "fail", "refuse", "name", "in part"]))
        if how in {"fulfil", "in part"}:
            outcomes: dict[bytes, Outcome] = {pair.digest: self._draw(OUTCOMES) for pair in claim.pairs}
            if how == "in part":  # some are found in the store before the rest is sent, or put back
                first = dict(list(outcomes.items())[: len(outcomes) // 2])
                await self._queue.complete(claim, first)
                await self.check([claim])
                self._claims.append(claim)
                return
            await self._queue.complete(claim, outcomes)
        elif how == "put back":
            await self._queue.release(claim)
        elif how == "fail":
            await self._queue.fail(claim, DOWN, retry_after_seconds=0)
        else:
            refused = PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad")
            named = {claim.pairs[0].digest: refused} if how == "name" else {}
            await self._queue.reject(claim, refused, named)

    async def finish(self) -> None:
        """The model answers whatever is asked from now on."""
        for claim in self._claims:
            await self._queue.release(claim)
        self._claims.clear()
        while isinstance(taken := await self._queue.claim(), Claim):
            await self._queue.complete(taken, {pair.digest: 3 for pair in taken.pairs})
        assert all(not wait.pending for wait in self._waits), "a caller waits for ever"
        assert self._queue._entries == {}
        assert (self._queue._total_bytes, self._queue._scheduler.size_bytes, len(self._queue._scheduler)) == (
            0,
            0,
            0,
        )
        assert not self._queue._bisector._groups
        assert not self._queue._bisector._unsent_halves
        assert not self._waiters._by_digest

    async def check(self, extra: list[Claim] | None = None) -> None:
        """Every pair that has not ended is in exactly one place, and every open wait has its pair there."""
        queue = self._queue
        suspects = queue._bisector
        places = [entry.pair for entry in queue._scheduler.entries()]
        places += [entry.pair for group in suspects._groups for entry in group]
        places += [entry.pair for group in suspects._unsent_halves.values() for entry in group]
        places += [
            pair for claim in [*self._claims, *(extra or [])] for pair in claim.pairs if self._is_held(pair)
        ]
        assert sorted(map(id, places)) == sorted(id(entry.pair) for entry in queue._entries.values())
        assert queue._total_bytes == sum(pair.size_bytes for pair in places)
        assert queue._scheduler.size_bytes == sum(
            entry.pair.size_bytes for entry in queue._scheduler.entries()
        )
        assert {digest for wait in self._waits for digest in wait.pending} <= set(queue._entries)
        assert all(group for group in suspects._groups)

    def _is_held(self, pair: Pair) -> bool:
        entry = self._queue._entries.get(pair.digest)
        return entry is not None and entry.pair is pair


async def _play(data: st.DataObject) -> None:
    play = Play(data)
    steps = [play.ask, play.ask, play.leave, play.claim, play.claim, play.end]
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=40)):
        await step()
        await play.check()
    await play.finish()


@settings(max_examples=300)
@given(st.data())
def test_every_pair_ends_once_for_everyone_who_asked(data: st.DataObject) -> None:
    """Through any order of asking, leaving, sending, failing and refusing: none lost, none in two places,
    none sent that nobody waits for, and every byte given back.
    """  # noqa: D205 - one thought
    asyncio.run(_play(data))
