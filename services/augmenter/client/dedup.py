"""What is asked for the text in hand, and its answers: a pair is asked by the first window that has it."""

import asyncio
import itertools
import time
import weakref
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from services.augmenter.pipeline.jsonl import Pair

_MAX_TABLE_TEXT_BYTES = 6 * 2**20  # of text: with more, fewer pairs are new, but every look-up takes longer
_MAX_TABLE_PAIRS = 60_000
_MAX_TABLE_SECONDS = 5.0  # an answer that others may have forgotten by then


class InFlightBatch:
    """The pairs that one window is the first to have, on their way.

    State: `levels` (0: none) and `refused` (why), by the pair's place; nothing of it changes once it is
    `over`. What is left without either then, those who wait for it ask for themselves.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.levels = bytearray(len(pairs))
        self.rejected: dict[int, str] = {}
        self.finished = asyncio.Event()
        # Not held: of those that nobody waits in any more there may be hundreds before it is over.
        self._first_ids: weakref.WeakKeyDictionary[PairTable, int] = weakref.WeakKeyDictionary()

    def add_table(self, table: "PairTable", first_id: int) -> None:
        """The pairs have the numbers from `first` in that book."""
        self._first_ids[table] = first_id

    def select(self, indices: Sequence[int]) -> list[Pair]:
        """The pairs at these places."""
        if isinstance(indices, range):  # as nearly all are: a hundredth of a run's time is saved
            return self.pairs[indices.start : indices.stop]
        return [self.pairs[place] for place in indices]

    def set_levels(self, indices: Sequence[int], levels: bytes) -> None:
        """These are theirs."""
        if isinstance(indices, range):
            self.levels[indices.start : indices.stop] = levels
            return
        for place, level in zip(indices, levels, strict=True):
            self.levels[place] = level

    def finish(self) -> None:
        """Whoever began it ends it, however that went."""
        for book, first in self._first_ids.items():
            book.levels[first : first + len(self.levels)] = self.levels
        if 0 in self.levels:
            for place, level in enumerate(self.levels):
                if not level and place not in self.rejected:
                    for book in self._first_ids:
                        book.forget(self.pairs[place])
        self.finished.set()


class PairTable:
    """Pairs by number, each with the flight that asks it.

    State: `_numbers` (of a pair that was left without an answer no longer; none once it is over), `levels`
    (by number; 0: not yet, or never), `_flights` and `_firsts` (the first number of each), in their order.
    """

    def __init__(self, inherited: Iterable[InFlightBatch] = ()) -> None:
        self.levels = bytearray()
        self._ids: defaultdict[Pair, int] = defaultdict(itertools.count().__next__)
        self._batches: list[InFlightBatch] = []
        self._first_ids: list[int] = []
        for flight in inherited:
            self._lookup_ids(flight.pairs)
            self._append(flight)

    def __len__(self) -> int:
        return len(self._ids)

    def assign_ids(self, pairs: Iterable[Pair]) -> tuple["array[int]", InFlightBatch]:
        """The number of each pair; and the flight of those that are new, for the caller to make and end."""
        known = len(self._ids)
        try:
            which = self._lookup_ids(pairs)
        except BaseException:  # of what makes the pairs as they are looked at
            self._start_batch(known).finish()
            raise
        return which, self._start_batch(known)

    def _start_batch(self, known_count: int) -> InFlightBatch:
        new = list(itertools.islice(reversed(self._ids), len(self._ids) - known_count))
        new.reverse()
        flight = InFlightBatch(new)
        self._append(flight)
        return flight

    def _lookup_ids(self, pairs: Iterable[Pair]) -> "array[int]":
        return array("I", map(self._ids.__getitem__, pairs))  # a list would be pointers all over the heap

    def _append(self, batch: InFlightBatch) -> None:
        first = len(self.levels)
        batch.add_table(self, first)
        self.levels += batch.levels
        self._batches.append(batch)
        self._first_ids.append(first)

    def get_levels(self, ids: "array[int]") -> bytes:
        """The level of each number, or 0."""
        return bytes(map(self.levels.__getitem__, ids))

    def find_batch(self, pair_id: int) -> tuple[InFlightBatch, int]:
        """Who asks it, and its place there."""
        at = bisect_right(self._first_ids, pair_id) - 1
        return self._batches[at], pair_id - self._first_ids[at]

    def forget(self, pair: Pair) -> None:
        """Whoever has it next asks it."""
        self._ids.pop(pair, None)  # of a book that is over there is none

    def close(self) -> None:
        """Nothing more is numbered in it; whoever waits for answers has what that takes."""
        self._ids.clear()

    def pending(self) -> Sequence[InFlightBatch]:
        """The flights that are not over."""
        return [flight for flight in self._batches if not flight.finished.is_set()]


class PairDeduplicator:
    """The book of what is in hand; begun anew when that is nothing, and so often that it stays small.

    State: `_book`, with the bytes of text that went into it, how many pairs it began with and when; `_files`
    in work.
    """

    def __init__(self) -> None:
        self._table = PairTable()
        self._text_bytes = 0
        self._inherited_count = 0
        self._started_at = time.monotonic()
        self._files_in_progress = 0

    @contextmanager
    def track_file(self) -> Iterator[None]:
        """Around all that is asked for one file."""
        self._files_in_progress += 1
        try:
            yield
        finally:
            self._files_in_progress -= 1
            if not self._files_in_progress:
                self._start_table()

    def table_for(self, text_bytes: int) -> PairTable:
        """The book for so much more text."""
        new = len(self._table) - self._inherited_count
        full = self._text_bytes + text_bytes > _MAX_TABLE_TEXT_BYTES or new > _MAX_TABLE_PAIRS
        if full or time.monotonic() > self._started_at + _MAX_TABLE_SECONDS:
            self._start_table()
        self._text_bytes += text_bytes
        return self._table

    def _start_table(self) -> None:
        self._table.close()  # who waits in it, and there may be one for each block in hand, needs no look-up
        self._table = PairTable(self._table.pending())  # which nobody asks a second time
        self._text_bytes = 0
        self._inherited_count = len(self._table)
        self._started_at = time.monotonic()
