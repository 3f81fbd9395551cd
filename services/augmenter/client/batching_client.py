"""Obtains the levels of pairs: in batches, without duplicates, with retries, and pair by pair if rejected."""

import asyncio
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial

from services.augmenter.client.dedup import InFlightBatch, PairDeduplicator, PairTable
from services.augmenter.client.retry import RetryBudget
from services.augmenter.client.rpc import PairsRejectedError, SeniorityClient
from services.augmenter.domain import Pair, PairLevels
from services.augmenter.stats import RunStats
from services.common.tasks import gather_or_cancel

_MAX_CONCURRENT_RPCS = 32
# The default limit of a gRPC server is 4 MiB. Text takes at least as many bytes in JSON as in a message, so
# input of this size fits into one message.
_MAX_MESSAGE_BYTES = 3 * 2**20
# The longest UTF-8 encoding of a character.
_MAX_CHARACTER_BYTES = 4


class ProxyClient:
    """Client that all files share.

    It bounds the number of concurrent RPCs, and does not send a pair again that another file, or an earlier
    part of the same file, has just sent.
    """

    def __init__(self, rpc: SeniorityClient, *, batch_size: int, stats: RunStats) -> None:
        self._rpc = rpc
        self._batch_size = batch_size
        self._stats = stats
        self._rpc_slots = asyncio.Semaphore(_MAX_CONCURRENT_RPCS)
        self._deduplicator = PairDeduplicator()

    def track_file(self) -> AbstractContextManager[None]:
        """Return a context manager around all requests of one file."""
        return self._deduplicator.track_file()

    async def get_levels(
        self, pairs: Iterable[list[Pair]], budget: RetryBudget, *, text_bytes: int
    ) -> PairLevels:
        """Return the levels of pairs that were parsed from `text_bytes` of text. Raises RpcFailedError.

        Each list of pairs is looked up before the next is requested, and not kept.
        """
        table = self._deduplicator.table_for(text_bytes)
        ids, batch = table.assign_ids(itertools.chain.from_iterable(pairs))
        try:
            self._stats.pairs_sent += len(batch.pairs)
            parts = self._split_batches(batch.pairs, text_bytes)
            await gather_or_cancel(self._resolve_batch(batch, part, budget) for part in parts)
        finally:
            batch.finish()
        levels = table.get_levels(ids)
        if 0 not in levels:
            return PairLevels(levels)
        reasons = await self._wait_for_missing(table, ids, levels, budget, text_bytes)
        levels = table.get_levels(ids)
        return PairLevels(
            levels,
            {
                index: reasons[pair_id]
                for index, (pair_id, level) in enumerate(zip(ids, levels, strict=True))
                if not level
            },
        )

    async def _wait_for_missing(
        self, table: PairTable, ids: "array[int]", levels: bytes, budget: RetryBudget, text_bytes: int
    ) -> dict[int, str]:
        """Wait until each pair without a level has one, or a reason for none. Return the reasons by id.

        Such a pair was sent by an earlier call of `get_levels`, or was rejected.
        """
        missing = {pair_id for pair_id, level in zip(ids, levels, strict=True) if not level}
        reasons: dict[int, str] = {}
        unresolved: dict[int, Pair] = {}
        for pair_id in missing:
            batch, index = table.find_batch(pair_id)
            await batch.finished.wait()
            if index in batch.rejected:
                reasons[pair_id] = batch.rejected[index]
            elif not batch.levels[index]:
                unresolved[pair_id] = batch.pairs[index]
        # The call that sent these pairs failed, at the cost of its own file's retry budget. This file still
        # has its budget, so the pairs are sent again.
        if unresolved:
            resolved = await self.get_levels([list(unresolved.values())], budget, text_bytes=text_bytes)
            for index, pair_id in enumerate(unresolved):
                table.levels[pair_id] = resolved.levels[index]
                if index in resolved.rejected:
                    reasons[pair_id] = resolved.rejected[index]
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
        """Send a batch until each pair has a level or a reason, without the pairs that were rejected."""
        waiting = [batch]
        attempts = itertools.count(1)
        while waiting:
            indices = waiting.pop()
            try:
                levels = await budget.call(partial(self._infer, in_flight.select(indices), attempts))
            except PairsRejectedError as rejection:
                waiting += _record_rejection(indices, rejection, in_flight.rejected)
            else:
                in_flight.set_levels(indices, levels)

    async def _infer(self, batch: Sequence[Pair], attempts: Iterator[int]) -> bytes:
        # A failed call reports no cache hits, yet it fills the cache. Counting the hits of its retry would
        # make the hit rate look too good.
        first = next(attempts) == 1
        # The slot is held for one RPC, not while waiting for a retry.
        async with self._rpc_slots:
            return await self._rpc.infer(batch, count_hits=first)


def _split_by_size(pairs: list[Pair], indices: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield batches within a server's message limit. A pair that exceeds it alone is its own batch."""
    batch: list[int] = []
    batch_bytes = 0
    for index in indices:
        pair_bytes = _MAX_CHARACTER_BYTES * (len(pairs[index].company) + len(pairs[index].title))
        if batch and batch_bytes + pair_bytes > _MAX_MESSAGE_BYTES:
            yield batch
            batch = []
            batch_bytes = 0
        batch.append(index)
        batch_bytes += pair_bytes
    yield batch


def _record_rejection(
    indices: Sequence[int], rejection: PairsRejectedError, rejected: dict[int, str]
) -> list[Sequence[int]]:
    """Record the reasons of rejected pairs, and return the batches that are still to be sent."""
    if rejection.reasons:
        rejected.update((indices[index], reason) for index, reason in rejection.reasons.items())
        rest = [pair_index for index, pair_index in enumerate(indices) if index not in rejection.reasons]
        return [rest] if rest else []
    if len(indices) == 1:
        rejected[indices[0]] = rejection.message
        return []
    # The server does not name the invalid pair: bisect.
    middle = len(indices) // 2
    return [indices[middle:], indices[:middle]]
