"""A local or shared queue with the same interface, for the suites that both must pass."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from math import inf

from prometheus_client import CollectorRegistry

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.interface import (
    Claim,
    ClaimDeferred,
    EnqueueResult,
    Queue,
    QueueLimits,
    RequestContext,
)
from services.cache_proxy.queue.managed_queue import create_local_queue
from services.cache_proxy.queue.quotas import NO_QUOTAS, Quotas
from tests.support.replicas import (
    QueueLocation,
    numbered_pair,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)

_WARM_UP_NUMBER = 10**9
AsyncAction = Callable[[], Awaitable[None]]


@dataclass
class MutableQuotas:
    """Quotas that a test may change."""

    current: Quotas


class QueueSubject:
    """A queue under test and what it reported.

    `age_quotas(seconds)` makes the consumption of quotas older, and `poll` does what a waiting request
    does from time to time.
    """

    def __init__(
        self,
        queue: Queue,
        resolved: list[tuple[bytes, Outcome]],
        quotas: MutableQuotas,
        poll: AsyncAction,
        age_quotas: Callable[[float], None],
        receive_messages: AsyncAction,
        backoff_deadlines: list[float],
    ) -> None:
        self.queue = queue
        self.resolved = resolved
        self.quotas = quotas
        self.poll = poll
        self.age_quotas = age_quotas
        self.receive_messages = receive_messages
        self.backoff_deadlines = backoff_deadlines

    async def enqueue(self, pairs: list[Pair], context: RequestContext | None = None) -> EnqueueResult:
        """Enqueue pairs."""
        return await self.queue.enqueue(pairs, context or request_context())

    async def claim_batch(self) -> Claim:
        """Claim the next batch, which must be due soon."""
        for _ in range(100):
            decision = await self.queue.claim()
            if isinstance(decision, Claim):
                return decision
            assert decision.wait_seconds < 2, decision
            await asyncio.sleep(decision.wait_seconds)
        raise AssertionError("no batch")

    async def complete(self, claim: Claim, level: int = 3) -> None:
        """Complete a claim with one level for all pairs."""
        await self.queue.complete(claim, {item.digest: level for item in claim.pairs})

    async def drain(self) -> list[int]:
        """Claim and complete until nothing is due for a while; return the numbers of the pairs."""
        gone = []
        while True:
            decision = await self.queue.claim()
            if isinstance(decision, Claim):
                gone += pair_numbers(decision)
                await self.complete(decision)
            elif decision.wait_seconds > 1:
                return gone
            else:
                await asyncio.sleep(decision.wait_seconds)

    async def is_empty(self) -> bool:
        """Return whether a claim finds no waiting pair."""
        return await self.queue.claim() == ClaimDeferred(inf)

    def outcomes(self) -> dict[int, Outcome]:
        """Return the outcomes by pair number; each pair must have ended once."""
        found = {int.from_bytes(digest, "big"): outcome for digest, outcome in self.resolved}
        assert len(found) == len(self.resolved), "ended twice"
        return found


QueueFactory = Callable[..., AbstractAsyncContextManager[QueueSubject]]


def queue_factory(kind: str, redis_url: str) -> QueueFactory:
    """Return a function that opens a `local` or `redis` queue with limits and quotas.

    With `begun` it has sent a pair, so that quotas may be aged.
    """

    @asynccontextmanager
    async def local(
        bounds: QueueLimits | None = None, quotas: Quotas = NO_QUOTAS, *, begun: bool = False
    ) -> AsyncIterator[QueueSubject]:
        settled: list[tuple[bytes, Outcome]] = []
        given_up: list[float] = []
        held = MutableQuotas(quotas)
        queue = create_local_queue(
            bounds or queue_limits(),
            on_outcome=lambda *end: settled.append(end),
            metrics=ProxyMetrics(CollectorRegistry()),
            quotas=lambda: held.current,
            on_model_backoff=lambda moment, _error: given_up.append(moment),
        )

        async def poll() -> None:
            await queue.enqueue([], request_context())

        def age_quotas(seconds: float) -> None:
            accounts = queue._quota_limiter
            accounts._history_start -= seconds
            accounts._tat = {name: at - seconds for name, at in accounts._tat.items()}

        async def receive_messages() -> None:
            pass

        yield QueueSubject(queue, settled, held, poll, age_quotas, receive_messages, given_up)

    @asynccontextmanager
    async def shared(
        bounds: QueueLimits | None = None, quotas: Quotas = NO_QUOTAS, *, begun: bool = False
    ) -> AsyncIterator[QueueSubject]:
        held = MutableQuotas(quotas)
        place = QueueLocation.create(redis_url)
        async with replicas(place, bounds=bounds, quotas=lambda: held.current) as (replica,):
            # The first claim of a queue takes all quotas for spent.
            if begun:
                await replica.queue.enqueue(
                    numbered_pairs([_WARM_UP_NUMBER]), request_context(priority="refresh")
                )
                await replica.queue.complete(
                    await replica.claim_batch(), {numbered_pair(_WARM_UP_NUMBER).digest: 1}
                )
                replica.resolved.clear()
            given_up: list[float] = []
            replica.queue._on_model_backoff = lambda moment, _error: given_up.append(moment)
            yield QueueSubject(
                replica.queue,
                replica.resolved,
                held,
                replica.queue.re_enqueue,
                lambda seconds: place.age_quotas(round(seconds * 1000)),
                replica.receive_messages,
                given_up,
            )

    return local if kind == "local" else shared
