"""A queue of either kind, for the suites that both must pass: that of one process, that of all in Redis."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from math import inf

from prometheus_client import CollectorRegistry

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.interface import (
    Asker,
    Claim,
    Enqueued,
    NotYet,
    Outcome,
    Pair,
    Queue,
    QueueLimits,
)
from services.cache_proxy.queue.managed_queue import open_local
from services.cache_proxy.queue.quotas import NO_QUOTAS, Quotas
from tests.support.replicas import Place, asker, limits, numbers_of, pair, pairs, replicas

_WARM = 10**9
Poll = Callable[[], Awaitable[None]]


@dataclass
class Held:
    """The quotas, which a test may change."""

    now: Quotas


class Subject:
    """A queue, what it settled, and what a waiter does from time to time (`poll`).

    `age_quotas`: as if so many seconds had passed since they were spent. `hear`: take in what was published.
    `given_up`: the moments before which it was told that there is no call.
    """

    def __init__(
        self, queue: Queue, settled: list[tuple[bytes, Outcome]], quotas: Held, poll: Poll,
        age_quotas: Callable[[float], None], hear: Poll, given_up: list[float],
    ) -> None:  # fmt: skip
        self.queue = queue
        self.settled = settled
        self.quotas = quotas
        self.poll = poll
        self.age_quotas = age_quotas
        self.hear = hear
        self.given_up = given_up

    async def ask(self, wanted: list[Pair], who: Asker | None = None) -> Enqueued:
        """Ask for pairs."""
        return await self.queue.enqueue(wanted, who or asker())

    async def take(self) -> Claim:
        """The next batch, which is due."""
        for _ in range(100):
            decision = await self.queue.claim()
            if isinstance(decision, Claim):
                return decision
            assert decision.wait_seconds < 2, decision
            await asyncio.sleep(decision.wait_seconds)
        raise AssertionError("no batch")

    async def answer(self, claim: Claim, level: int = 3) -> None:
        """Be the model."""
        await self.queue.fulfil(claim, {item.digest: level for item in claim.pairs})

    async def drain(self) -> list[int]:
        """Be a dispatcher and a model until nothing may go for a while: the pairs that went."""
        gone = []
        while True:
            decision = await self.queue.claim()
            if isinstance(decision, Claim):
                gone += numbers_of(decision)
                await self.answer(decision)
            elif decision.wait_seconds > 1:
                return gone
            else:
                await asyncio.sleep(decision.wait_seconds)

    async def nothing_waits(self) -> bool:
        """Whether a claim says so."""
        return await self.queue.claim() == NotYet(inf)

    def ended(self) -> dict[int, Outcome]:
        """How pairs ended, by number, each once."""
        found = {int.from_bytes(digest, "big"): outcome for digest, outcome in self.settled}
        assert len(found) == len(self.settled), "told twice"
        return found


Open = Callable[..., AbstractAsyncContextManager[Subject]]


def opening(kind: str, redis_url: str) -> Open:
    """Opens a queue of that kind, `local` or `redis`, with the limits and quotas that a test needs.

    `begun`: it has sent something, so that quotas may be aged.
    """

    @asynccontextmanager
    async def local(
        bounds: QueueLimits | None = None, quotas: Quotas = NO_QUOTAS, *, begun: bool = False
    ) -> AsyncIterator[Subject]:
        settled: list[tuple[bytes, Outcome]] = []
        given_up: list[float] = []
        held = Held(quotas)
        queue = open_local(
            bounds or limits(), settle=lambda *end: settled.append(end),
            metrics=ProxyMetrics(CollectorRegistry()), quotas=lambda: held.now,
            give_up=lambda moment, _error: given_up.append(moment),
        )  # fmt: skip

        async def poll() -> None:
            await queue.enqueue([], asker())

        def age_quotas(seconds: float) -> None:
            accounts = queue._accounts
            accounts._since -= seconds
            accounts._spent_until = {name: at - seconds for name, at in accounts._spent_until.items()}

        async def hear() -> None:
            pass

        yield Subject(queue, settled, held, poll, age_quotas, hear, given_up)

    @asynccontextmanager
    async def shared(
        bounds: QueueLimits | None = None, quotas: Quotas = NO_QUOTAS, *, begun: bool = False
    ) -> AsyncIterator[Subject]:
        held = Held(quotas)
        place = Place.new(redis_url)
        async with replicas(place, bounds=bounds, quotas=lambda: held.now) as (replica,):
            if begun:  # else the first claim takes all quotas for spent
                await replica.queue.enqueue(pairs([_WARM]), asker(priority="refresh"))
                await replica.queue.fulfil(await replica.take(), {pair(_WARM).digest: 1})
                replica.settled.clear()
            given_up: list[float] = []
            replica.queue._give_up = lambda moment, _error: given_up.append(moment)
            yield Subject(
                replica.queue, replica.settled, held, replica.queue.ask_again,
                lambda seconds: place.age_quotas(round(seconds * 1000)), replica.messages, given_up,
            )  # fmt: skip

    return local if kind == "local" else shared
