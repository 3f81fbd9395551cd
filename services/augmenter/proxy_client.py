"""Asks for levels: pairs in batches, together, with retries, and refused pairs told from the others."""

import asyncio
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from services.augmenter.jsonl import Pair
from services.augmenter.retry import RetryBudget
from services.augmenter.rpc import PairsRefusedError, SeniorityRpc
from services.augmenter.tasks import together
from services.augmenter.totals import Totals
from services.augmenter.window import Answers

_RPCS_AT_ONCE = 32
# A gRPC server takes 4 MiB unless it was told otherwise. In JSON a text is at least as long as in a message.
_MESSAGE_BYTES = 3 * 2**20
_CHARACTER_BYTES = 4  # at most


@dataclass(eq=False, slots=True)
class _Flight:
    """What one window asks. Who waits for a pair without having sent it looks when it is `over`.

    State: `levels` (0: none yet, or never) and `refused`, by the pair's place.
    """

    levels: list[int]
    refused: dict[int, str] = field(default_factory=dict)
    over: asyncio.Event = field(default_factory=asyncio.Event)


class ProxyClient:
    """Shared by all files: bounds the RPCs that are under way, and asks no pair twice at a time.

    State: `_in_flight`, each pair that is being asked, by a number that is never given again; `_flights`, by
    the first number of each, in order. A flight is ended by the file that began it; whatever it leaves
    without an answer, the others ask for themselves, on their own budget.
    """

    def __init__(self, rpc: SeniorityRpc, *, batch_size: int, totals: Totals) -> None:
        self._rpc = rpc
        self._batch_size = batch_size
        self._totals = totals
        self._places = asyncio.Semaphore(_RPCS_AT_ONCE)
        self._in_flight: dict[Pair, int] = {}
        self._flights: dict[int, _Flight] = {}
        self._next = 0

    async def ask(self, pairs: list[Pair], budget: RetryBudget, *, text_bytes: int) -> Answers:
        """The levels of distinct pairs, which were read from so many bytes. Raises RpcFailedError."""
        if not pairs:  # its flight would have the number of the next
            return Answers([])
        first, self._next = self._next, self._next + len(pairs)
        # One step of C a pair: it is given its number, or joins the one that it has.
        numbers = list(map(self._in_flight.setdefault, pairs, range(first, self._next)))
        joined = self._joined(numbers, first)
        mine = bytearray(b"\1") * len(pairs)
        for place, _, _ in joined:
            mine[place] = 0
        places = list(itertools.compress(range(len(pairs)), mine)) if joined else range(len(pairs))
        flight = self._flights[first] = _Flight([0] * len(pairs))
        try:
            self._totals.pairs_asked += len(places)
            batches = self._batches(pairs, places, text_bytes)
            await together(self._resolve(pairs, batch, flight, budget) for batch in batches)
        finally:
            del self._flights[first]
            for pair in map(pairs.__getitem__, places):
                del self._in_flight[pair]
            flight.over.set()
        answers = Answers(flight.levels.copy(), flight.refused.copy())  # ours to add to
        left = await _taken(joined, answers)
        if left:
            more = await self.ask([pairs[place] for place in left], budget, text_bytes=text_bytes)
            for place, level in zip(left, more.levels, strict=True):
                answers.levels[place] = level
            answers.refused |= {left[place]: why for place, why in more.refused.items()}
        return answers

    def _joined(self, numbers: list[int], first: int) -> list[tuple[int, _Flight, int]]:
        """The places of pairs that are on their way already, with the flight of each and its place there."""
        firsts, flights = list(self._flights), list(self._flights.values())
        theirs = [(place, number) for place, number in enumerate(numbers) if number < first]
        at = [bisect_right(firsts, number) - 1 for _, number in theirs]
        return [
            (place, flights[one], number - firsts[one])
            for (place, number), one in zip(theirs, at, strict=True)
        ]

    def _batches(self, pairs: list[Pair], places: Sequence[int], text_bytes: int) -> Iterator[Sequence[int]]:
        for start in range(0, len(places), self._batch_size):
            batch = places[start : start + self._batch_size]
            if text_bytes <= _MESSAGE_BYTES:
                yield batch
            else:
                yield from _light(pairs, batch)

    async def _resolve(
        self, pairs: list[Pair], batch: Sequence[int], flight: _Flight, budget: RetryBudget
    ) -> None:
        """Ask, and ask again without the pairs that were refused, until each pair is settled."""
        waiting = [batch]
        tries = itertools.count(1)
        while waiting:
            places = waiting.pop()
            try:
                levels = await budget.call(partial(self._infer, [pairs[place] for place in places], tries))
            except PairsRefusedError as refusal:
                waiting += _settle(places, refusal, flight.refused)
            else:
                for place, level in zip(places, levels, strict=True):
                    flight.levels[place] = level

    async def _infer(self, batch: Sequence[Pair], tries: Iterator[int]) -> list[int]:
        # A failed call tells no hits, yet fills the cache: counting the hits of the next would flatter it.
        first = next(tries) == 1
        async with self._places:  # held for one RPC, never while waiting to retry
            return await self._rpc.infer(batch, count_hits=first)


async def _taken(joined: list[tuple[int, _Flight, int]], answers: Answers) -> list[int]:
    """Wait for what others asked and take their answers; the places of the pairs that have none."""
    left: list[int] = []
    for place, flight, there in joined:
        await flight.over.wait()
        answers.levels[place] = flight.levels[there]
        if there in flight.refused:
            answers.refused[place] = flight.refused[there]
        elif not flight.levels[there]:
            left.append(place)
    return left


def _light(pairs: list[Pair], places: Sequence[int]) -> Iterator[Sequence[int]]:
    """Batches that a server takes, but for a pair that is too long by itself."""
    batch: list[int] = []
    size = 0
    for place in places:
        more = _CHARACTER_BYTES * (len(pairs[place].company) + len(pairs[place].title))
        if batch and size + more > _MESSAGE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += more
    yield batch


def _settle(
    places: Sequence[int], refusal: PairsRefusedError, refused: dict[int, str]
) -> list[Sequence[int]]:
    """Note the refused pairs; what is left is to be asked again."""
    if refusal.reasons:
        refused.update((places[index], reason) for index, reason in refusal.reasons.items())
        rest = [place for index, place in enumerate(places) if index not in refusal.reasons]
        return [rest] if rest else []
    if len(places) == 1:
        refused[places[0]] = refusal.message
        return []
    middle = len(places) // 2  # the server does not say which: halve until it is plain
    return [places[middle:], places[:middle]]
