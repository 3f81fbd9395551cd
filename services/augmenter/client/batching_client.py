"""Asks for levels: pairs in batches, together, with retries, and refused pairs told from the others."""

import asyncio
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from services.augmenter.client.dedup import InFlightBatch, PairDeduplicator, PairTable
from services.augmenter.client.retry import RetryBudget
from services.augmenter.client.rpc import PairsRejectedError, SeniorityClient
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.pipeline.line_blocks import PairLevels
from services.augmenter.stats import RunStats
from services.common.tasks import gather_or_cancel

_MAX_CONCURRENT_RPCS = 32
# A gRPC server takes 4 MiB unless it was told otherwise. In JSON a text is at least as long as in a message.
_MAX_MESSAGE_BYTES = 3 * 2**20
_MAX_CHARACTER_BYTES = 4  # at most


class ProxyClient:
    """Shared by all files: bounds the RPCs that are under way, and asks no pair of the text in hand twice."""

    def __init__(self, rpc: SeniorityClient, *, batch_size: int, stats: RunStats) -> None:
        self._rpc = rpc
        self._batch_size = batch_size
        self._stats = stats
        self._rpc_slots = asyncio.Semaphore(_MAX_CONCURRENT_RPCS)
        self._deduplicator = PairDeduplicator()

    def track_file(self) -> AbstractContextManager[None]:
        """Around all that is asked for one file."""
        return self._deduplicator.track_file()

    async def get_levels(
        self, pairs: Iterable[list[Pair]], budget: RetryBudget, *, text_bytes: int
    ) -> PairLevels:
        """The levels of pairs that were read from so many bytes. Raises RpcFailedError.

        Each list is looked at before the next is made, and forgotten.
        """
        book = self._deduplicator.table_for(text_bytes)
        which, flight = book.assign_ids(itertools.chain.from_iterable(pairs))
        try:
            self._stats.pairs_sent += len(flight.pairs)
            batches = self._split_batches(flight.pairs, text_bytes)
            await gather_or_cancel(self._resolve_batch(flight, batch, budget) for batch in batches)
        finally:
            flight.finish()
        levels = book.get_levels(which)
        if 0 not in levels:
            return PairLevels(levels)
        reasons = await self._wait_for_missing(book, which, levels, budget, text_bytes)
        levels = book.get_levels(which)
        return PairLevels(
            levels,
            {
                place: reasons[number]
                for place, (number, level) in enumerate(zip(which, levels, strict=True))
                if not level
            },
        )

    async def _wait_for_missing(
        self, table: PairTable, ids: "array[int]", levels: bytes, budget: RetryBudget, text_bytes: int
    ) -> dict[int, str]:
        """Wait until each number has its level, or its reason for none, which is returned."""
        missing = {number for number, level in zip(ids, levels, strict=True) if not level}
        reasons: dict[int, str] = {}
        left: dict[int, Pair] = {}
        for number in missing:
            flight, place = table.find_batch(number)
            await flight.finished.wait()
            if place in flight.rejected:
                reasons[number] = flight.rejected[place]
            elif not flight.levels[place]:
                left[number] = flight.pairs[place]
        if left:  # whoever asked got no answer; what it cost them is no reason for us not to try
            more = await self.get_levels([list(left.values())], budget, text_bytes=text_bytes)
            for place, number in enumerate(left):
                table.levels[number] = more.levels[place]
                if place in more.rejected:
                    reasons[number] = more.rejected[place]
        return reasons

    def _split_batches(self, pairs: list[Pair], text_bytes: int) -> Iterator[Sequence[int]]:
        for start in range(0, len(pairs), self._batch_size):
            batch = range(start, min(start + self._batch_size, len(pairs)))
            if text_bytes <= _MAX_MESSAGE_BYTES:
                yield batch
            else:
                yield from _split_by_size(pairs, batch)

    async def _resolve_batch(
        self, in_flight: InFlightBatch, batch: Sequence[int], budget: RetryBudget
    ) -> None:
        """Ask, and ask again without the pairs that were refused, until each pair is settled."""
        waiting = [batch]
        tries = itertools.count(1)
        while waiting:
            places = waiting.pop()
            try:
                levels = await budget.call(partial(self._infer, in_flight.select(places), tries))
            except PairsRejectedError as refusal:
                waiting += _record_rejection(places, refusal, in_flight.rejected)
            else:
                in_flight.set_levels(places, levels)

    async def _infer(self, batch: Sequence[Pair], attempts: Iterator[int]) -> bytes:
        # A failed call tells no hits, yet fills the cache: counting the hits of the next would flatter it.
        first = next(attempts) == 1
        async with self._rpc_slots:  # held for one RPC, never while waiting to retry
            return await self._rpc.infer(batch, count_hits=first)


def _split_by_size(pairs: list[Pair], indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """Batches that a server takes, but for a pair that is too long by itself."""
    batch: list[int] = []
    size = 0
    for place in indices:
        more = _MAX_CHARACTER_BYTES * (len(pairs[place].company) + len(pairs[place].title))
        if batch and size + more > _MAX_MESSAGE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += more
    yield batch


def _record_rejection(
    indices: Sequence[int], rejection: PairsRejectedError, rejected: dict[int, str]
) -> list[Sequence[int]]:
    """Note the refused pairs; what is left is to be asked again."""
    if rejection.reasons:
        rejected.update((indices[index], reason) for index, reason in rejection.reasons.items())
        rest = [place for index, place in enumerate(indices) if index not in rejection.reasons]
        return [rest] if rest else []
    if len(indices) == 1:
        rejected[indices[0]] = rejection.message
        return []
    middle = len(indices) // 2  # the server does not say which: halve until it is plain
    return [indices[middle:], indices[:middle]]
