"""Deduplicates pairs across files: each pair is sent by the first block of lines that contains it."""

import asyncio
import itertools
import time
import weakref
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from services.augmenter.domain import Pair

# With more text a table, fewer pairs are sent again, but each look-up takes longer.
_MAX_TABLE_TEXT_BYTES = 6 * 2**20
_MAX_TABLE_PAIRS = 60_000
# A table does not keep levels for longer, since the proxy may have dropped or replaced them by then.
_MAX_TABLE_SECONDS = 5.0


class InFlightBatch:
    """Pairs that one block of lines is the first to contain, while they are being resolved.

    State: `levels` (0: none yet) and `rejected` (reasons), by the pair's index. Neither changes once
    `finished` is set. A pair that then has neither level nor reason failed, and each block that waits for it
    sends it again.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.levels = bytearray(len(pairs))
        self.rejected: dict[int, str] = {}
        self.finished = asyncio.Event()
        # Weak references: while one slow batch is unfinished, hundreds of tables may come and go around it.
        self._first_id_by_table: weakref.WeakKeyDictionary[PairTable, int] = weakref.WeakKeyDictionary()

    def add_table(self, table: "PairTable", first_id: int) -> None:
        """Register a table in which the pairs have consecutive ids, beginning with `first_id`."""
        self._first_id_by_table[table] = first_id

    def select(self, indices: Sequence[int]) -> list[Pair]:
        """Return the pairs at these indices."""
        # Nearly all indices are ranges. A slice saves a hundredth of a run's time.
        if isinstance(indices, range):
            return self.pairs[indices.start : indices.stop]
        return [self.pairs[index] for index in indices]

    def set_levels(self, indices: Sequence[int], levels: bytes) -> None:
        """Set the levels of the pairs at these indices."""
        if isinstance(indices, range):
            self.levels[indices.start : indices.stop] = levels
            return
        for index, level in zip(indices, levels, strict=True):
            self.levels[index] = level

    def finish(self) -> None:
        """Finish the batch, resolved or not: publish its levels to the tables and wake the waiters.

        A pair without a level or a reason is removed from the tables, so that it is sent again.
        """
        for table, first_id in self._first_id_by_table.items():
            table.levels[first_id : first_id + len(self.levels)] = self.levels
        if 0 in self.levels:
            for index, level in enumerate(self.levels):
                if not level and index not in self.rejected:
                    for table in self._first_id_by_table:
                        table.forget(self.pairs[index])
        self.finished.set()


class PairTable:
    """Assigns an id to each distinct pair, and records which batch resolves it.

    State: `_ids` (without pairs whose batch failed; empty once closed), `levels` (by id; 0: none yet, or
    rejected), `_batches` and `_first_ids` (the first id of each batch), in the same order.
    """

    def __init__(self, inherited: Iterable[InFlightBatch] = ()) -> None:
        self.levels = bytearray()
        self._ids: defaultdict[Pair, int] = defaultdict(itertools.count().__next__)
        self._batches: list[InFlightBatch] = []
        self._first_ids: list[int] = []
        for batch in inherited:
            self._lookup_ids(batch.pairs)
            self._append(batch)

    def __len__(self) -> int:
        return len(self._ids)

    def assign_ids(self, pairs: Iterable[Pair]) -> tuple["array[int]", InFlightBatch]:
        """Return the id of each pair, and a batch of the new ones, which the caller must finish."""
        known_count = len(self._ids)
        try:
            ids = self._lookup_ids(pairs)
        except BaseException:
            # The iterable may fail while it yields. Pairs that have an id by then must not be waited for.
            self._start_batch(known_count).finish()
            raise
        return ids, self._start_batch(known_count)

    def _start_batch(self, known_count: int) -> InFlightBatch:
        new_pairs = list(itertools.islice(reversed(self._ids), len(self._ids) - known_count))
        new_pairs.reverse()
        batch = InFlightBatch(new_pairs)
        self._append(batch)
        return batch

    def _lookup_ids(self, pairs: Iterable[Pair]) -> "array[int]":
        # An array is compact. A list would hold pointers to integers all over the heap.
        return array("I", map(self._ids.__getitem__, pairs))

    def _append(self, batch: InFlightBatch) -> None:
        first_id = len(self.levels)
        batch.add_table(self, first_id)
        self.levels += batch.levels
        self._batches.append(batch)
        self._first_ids.append(first_id)

    def get_levels(self, ids: "array[int]") -> bytes:
        """Return the level of each id, or 0."""
        return bytes(map(self.levels.__getitem__, ids))

    def find_batch(self, pair_id: int) -> tuple[InFlightBatch, int]:
        """Return the batch that resolves the id, and the pair's index in it."""
        position = bisect_right(self._first_ids, pair_id) - 1
        return self._batches[position], pair_id - self._first_ids[position]

    def forget(self, pair: Pair) -> None:
        """Remove a pair whose batch failed, so that the next block that contains it sends it again."""
        # A closed table has no pairs.
        self._ids.pop(pair, None)

    def close(self) -> None:
        """Drop the ids of the pairs, most of the table's memory. Levels can still be read by id."""
        self._ids.clear()

    def pending(self) -> Sequence[InFlightBatch]:
        """Return the batches that are not finished."""
        return [batch for batch in self._batches if not batch.finished.is_set()]


class PairDeduplicator:
    """Provides the current table, and replaces it when it is full, too old, or when no file is in progress.

    State: `_table`, with the bytes of text looked up in it (`_text_bytes`), how many pairs it inherited
    (`_inherited_count`) and when it was started (`_started_at`); `_files_in_progress`.
    """

    def __init__(self) -> None:
        self._table = PairTable()
        self._text_bytes = 0
        self._inherited_count = 0
        self._started_at = time.monotonic()
        self._files_in_progress = 0

    @contextmanager
    def track_file(self) -> Iterator[None]:
        """Mark a file as in progress while the block runs."""
        self._files_in_progress += 1
        try:
            yield
        finally:
            self._files_in_progress -= 1
            if not self._files_in_progress:
                self._start_table()

    def table_for(self, text_bytes: int) -> PairTable:
        """Return the table for the pairs of `text_bytes` more text."""
        new_count = len(self._table) - self._inherited_count
        is_full = self._text_bytes + text_bytes > _MAX_TABLE_TEXT_BYTES or new_count > _MAX_TABLE_PAIRS
        if is_full or time.monotonic() > self._started_at + _MAX_TABLE_SECONDS:
            self._start_table()
        self._text_bytes += text_bytes
        return self._table

    def _start_table(self) -> None:
        # Blocks that wait in the old table have their ids already, so its look-up can go. The new table
        # inherits the unfinished batches, so that their pairs are not sent twice.
        self._table.close()
        self._table = PairTable(self._table.pending())

        self._text_bytes = 0
        self._inherited_count = len(self._table)
        self._started_at = time.monotonic()
