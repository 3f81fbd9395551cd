"""Asks for levels: pairs in batches, together, with retries, and refused pairs told from the others."""

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from grpc import aio

from services.augmenter.jsonl import Pair
from services.augmenter.retry import RetryBudget
from services.augmenter.rpc import PairsRefusedError, SeniorityRpc
from services.augmenter.tasks import together
from services.augmenter.totals import Totals
from services.augmenter.window import Answers

_RPCS_AT_ONCE = 32
# A gRPC server takes 4 MiB unless it was told otherwise; a character is at most 4 bytes.
_BATCH_CHARACTERS = 768 * 2**10
_KEEPALIVE_MS = 5 * 60 * 1000  # a server with gRPC's own settings drops who pings more often
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # ours know the file's budget
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


@dataclass(eq=False, slots=True)
class _Flight:
    """A batch on its way. Who waits for its pairs without having sent them looks when it is `over`."""

    batch: list[Pair]
    answers: Answers = field(default_factory=Answers)
    over: asyncio.Event = field(default_factory=asyncio.Event)


def open_channel(target: str) -> aio.Channel:
    """A channel; it connects when it is first used, and again whenever that is needed."""
    return aio.insecure_channel(target, options=_OPTIONS)


class ProxyClient:
    """Shared by all files: bounds the RPCs that are under way, and asks no pair twice at a time.

    State: `_in_flight`, each pair that is being asked. A flight is ended by the file that began it; whatever
    it leaves without an answer, the others ask for themselves, on their own budget.
    """

    def __init__(self, rpc: SeniorityRpc, *, batch_size: int, totals: Totals) -> None:
        self._rpc = rpc
        self._batch_size = batch_size
        self._totals = totals
        self._places = asyncio.Semaphore(_RPCS_AT_ONCE)
        self._in_flight: dict[Pair, _Flight] = {}

    async def ask(self, pairs: dict[Pair, None], budget: RetryBudget) -> Answers:
        """The levels of distinct pairs. Raises RpcFailedError."""
        answers = Answers()
        while pairs:
            joined = self._joined(pairs)
            if joined:
                pairs = {pair: None for pair in pairs if pair not in joined}
            flights = self._begun(pairs)
            try:
                await together(self._fly(flight, budget) for flight in flights)
            finally:
                self._ended(flights)
            for flight in flights:
                answers.levels.update(flight.answers.levels)
                answers.refused.update(flight.answers.refused)
            pairs = await _taken(joined, answers)
        return answers

    def _joined(self, pairs: dict[Pair, None]) -> dict[Pair, _Flight]:
        """Those of the pairs that are on their way for somebody else."""
        common = self._in_flight.keys() & pairs.keys() if self._in_flight else ()
        return {pair: self._in_flight[pair] for pair in common}

    def _begun(self, pairs: Iterable[Pair]) -> list[_Flight]:
        flights = [_Flight(batch) for batch in self._batches(pairs)]
        for flight in flights:
            self._in_flight.update(dict.fromkeys(flight.batch, flight))
            self._totals.pairs_asked += len(flight.batch)
        return flights

    def _ended(self, flights: Iterable[_Flight]) -> None:
        """Also those that never flew: another one failed first."""
        for flight in flights:
            if not flight.over.is_set():
                self._land(flight)

    def _land(self, flight: _Flight) -> None:
        for pair in flight.batch:
            del self._in_flight[pair]
        flight.over.set()

    async def _fly(self, flight: _Flight, budget: RetryBudget) -> None:
        await self._resolve(flight.batch, flight.answers, budget)
        self._land(flight)

    def _batches(self, pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
        left = list(pairs)
        for start in range(0, len(left), self._batch_size):
            batch = left[start : start + self._batch_size]
            if _characters(batch) <= _BATCH_CHARACTERS:
                yield batch
            else:
                yield from _light(batch)

    async def _resolve(self, batch: Sequence[Pair], answers: Answers, budget: RetryBudget) -> None:
        """Ask, and ask again without the pairs that were refused, until each pair is settled."""
        waiting = [batch]
        tries = itertools.count(1)
        while waiting:
            batch = waiting.pop()
            try:
                levels = await budget.call(partial(self._infer, batch, tries))
            except PairsRefusedError as refusal:
                waiting += _settle(batch, refusal, answers)
            else:
                answers.levels.update(zip(batch, levels, strict=True))

    async def _infer(self, batch: Sequence[Pair], tries: Iterator[int]) -> list[int]:
        # A failed call tells no hits, yet fills the cache: counting the hits of the next would flatter it.
        first = next(tries) == 1
        async with self._places:  # held for one RPC, never while waiting to retry
            return await self._rpc.infer(batch, count_hits=first)


def _characters(pairs: Iterable[Pair]) -> int:
    return sum([len(pair.company) + len(pair.title) for pair in pairs])


def _light(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Batches that a server takes, but for a pair that is too long by itself."""
    batch: list[Pair] = []
    characters = 0
    for pair in pairs:
        size = _characters([pair])
        if batch and characters + size > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(pair)
        characters += size
    yield batch


async def _taken(joined: dict[Pair, _Flight], answers: Answers) -> dict[Pair, None]:
    """Wait for what others asked; the pairs that they did not get an answer to."""
    left: dict[Pair, None] = {}
    for pair, flight in joined.items():
        await flight.over.wait()
        if pair in flight.answers.levels:
            answers.levels[pair] = flight.answers.levels[pair]
        elif pair in flight.answers.refused:
            answers.refused[pair] = flight.answers.refused[pair]
        else:
            left[pair] = None
    return left


def _settle(batch: Sequence[Pair], refusal: PairsRefusedError, answers: Answers) -> list[Sequence[Pair]]:
    """Note the refused pairs; what is left is to be asked again."""
    if refusal.reasons:
        answers.refused.update((batch[index], reason) for index, reason in refusal.reasons.items())
        rest = [pair for index, pair in enumerate(batch) if index not in refusal.reasons]
        return [rest] if rest else []
    if len(batch) == 1:
        answers.refused[batch[0]] = refusal.message
        return []
    middle = len(batch) // 2  # the server does not say which: halve until it is plain
    return [batch[middle:], batch[:middle]]
