"""Asks for levels: pairs in batches, together, with retries, and refused pairs told from the others."""

import asyncio
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from services.augmenter.client.dedup import Book, Books, Flight
from services.augmenter.client.retry import RetryBudget
from services.augmenter.client.rpc import PairsRefusedError, SeniorityRpc
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.pipeline.line_blocks import Answers
from services.augmenter.stats import Totals
from services.augmenter.tasks import together

_RPCS_AT_ONCE = 32
# A gRPC server takes 4 MiB unless it was told otherwise. In JSON a text is at least as long as in a message.
_MESSAGE_BYTES = 3 * 2**20
_CHARACTER_BYTES = 4  # at most


class ProxyClient:
    """Shared by all files: bounds the RPCs that are under way, and asks no pair of the text in hand twice."""

    def __init__(self, rpc: SeniorityRpc, *, batch_size: int, totals: Totals) -> None:
        self._rpc = rpc
        self._batch_size = batch_size
        self._totals = totals
        self._places = asyncio.Semaphore(_RPCS_AT_ONCE)
        self._books = Books()

    def file_in_work(self) -> AbstractContextManager[None]:
        """Around all that is asked for one file."""
        return self._books.file_in_work()

    async def ask(self, pairs: Iterable[list[Pair]], budget: RetryBudget, *, text_bytes: int) -> Answers:
        """The levels of pairs that were read from so many bytes. Raises RpcFailedError.

        Each list is looked at before the next is made, and forgotten.
        """
        book = self._books.of(text_bytes)
        which, flight = book.numbered(itertools.chain.from_iterable(pairs))
        try:
            self._totals.pairs_asked += len(flight.pairs)
            batches = self._batches(flight.pairs, text_bytes)
            await together(self._resolve(flight, batch, budget) for batch in batches)
        finally:
            flight.end()
        levels = book.levels_of(which)
        if 0 not in levels:
            return Answers(levels)
        reasons = await self._waited(book, which, levels, budget, text_bytes)
        levels = book.levels_of(which)
        return Answers(
            levels,
            {
                place: reasons[number]
                for place, (number, level) in enumerate(zip(which, levels, strict=True))
                if not level
            },
        )

    async def _waited(
        self, book: Book, which: "array[int]", levels: bytes, budget: RetryBudget, text_bytes: int
    ) -> dict[int, str]:
        """Wait until each number has its level, or its reason for none, which is returned."""
        missing = {number for number, level in zip(which, levels, strict=True) if not level}
        reasons: dict[int, str] = {}
        left: dict[int, Pair] = {}
        for number in missing:
            flight, place = book.flight_of(number)
            await flight.over.wait()
            if place in flight.refused:
                reasons[number] = flight.refused[place]
            elif not flight.levels[place]:
                left[number] = flight.pairs[place]
        if left:  # whoever asked got no answer; what it cost them is no reason for us not to try
            more = await self.ask([list(left.values())], budget, text_bytes=text_bytes)
            for place, number in enumerate(left):
                book.levels[number] = more.levels[place]
                if place in more.refused:
                    reasons[number] = more.refused[place]
        return reasons

    def _batches(self, pairs: list[Pair], text_bytes: int) -> Iterator[Sequence[int]]:
        for start in range(0, len(pairs), self._batch_size):
            batch = range(start, min(start + self._batch_size, len(pairs)))
            if text_bytes <= _MESSAGE_BYTES:
                yield batch
            else:
                yield from _light(pairs, batch)

    async def _resolve(self, flight: Flight, batch: Sequence[int], budget: RetryBudget) -> None:
        """Ask, and ask again without the pairs that were refused, until each pair is settled."""
        waiting = [batch]
        tries = itertools.count(1)
        while waiting:
            places = waiting.pop()
            try:
                levels = await budget.call(partial(self._infer, flight.part(places), tries))
            except PairsRefusedError as refusal:
                waiting += _settle(places, refusal, flight.refused)
            else:
                flight.answer(places, levels)

    async def _infer(self, batch: Sequence[Pair], tries: Iterator[int]) -> bytes:
        # A failed call tells no hits, yet fills the cache: counting the hits of the next would flatter it.
        first = next(tries) == 1
        async with self._places:  # held for one RPC, never while waiting to retry
            return await self._rpc.infer(batch, count_hits=first)


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
