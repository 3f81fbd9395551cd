"""A queue of either kind, for the suites that both must pass: that of one process, that of all in Redis."""

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
    """The quotas, which a test may change."""

    current: Quotas


class QueueSubject:
    """A queue, what it settled, and what a waiter does from time to time (`poll`).

    `age_quotas`: as if so many seconds had passed since they were spent. `hear`: take in what was published.
    `given_up`: the moments before which it was told that there is no call.
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
        """Ask for pairs."""
        return await self.queue.enqueue(pairs, context or request_context())

    async def claim_batch(self) -> Claim:
        """The next batch, which is due."""
        for _ in range(100):
            decision = await self.queue.claim()
            if isinstance(decision, Claim):
                return decision
            assert decision.wait_seconds < 2, decision
            await asyncio.sleep(decision.wait_seconds)
        raise AssertionError("no batch")

    async def complete(self, claim: Claim, level: int = 3) -> None:
        """Be the model."""
        await self.queue.complete(claim, {item.digest: level for item in claim.pairs})

    async def drain(self) -> list[int]:
        """Be a dispatcher and a model until nothing may go for a while: the pairs that went."""
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
        """Whether a claim says so."""
        return await self.queue.claim() == ClaimDeferred(inf)

    def outcomes(self) -> dict[int, Outcome]:
        """How pairs ended, by number, each once."""
        found = {int.from_bytes(digest, "big"): outcome for digest, outcome in self.resolved}
        assert len(found) == len(self.resolved), "told twice"
        return found


QueueFactory = Callable[..., AbstractAsyncContextManager[QueueSubject]]


def queue_factory(kind: str, redis_url: str) -> QueueFactory:
    """Opens a queue of that kind, `local` or `redis`, with the limits and quotas that a test needs.

    `begun`: it has sent something, so that quotas may be aged.
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

        async def hear() -> None:
            pass

        yield QueueSubject(queue, settled, held, poll, age_quotas, hear, given_up)

    @asynccontextmanager
    async def shared(
        bounds: QueueLimits | None = None, quotas: Quotas = NO_QUOTAS, *, begun: bool = False
    ) -> AsyncIterator[QueueSubject]:
        held = MutableQuotas(quotas)
        place = QueueLocation.create(redis_url)
        async with replicas(place, bounds=bounds, quotas=lambda: held.current) as (replica,):
            if begun:  # else the first claim takes all quotas for spent
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
