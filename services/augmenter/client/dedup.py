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

_BOOK_BYTES = 6 * 2**20  # of text: with more, fewer pairs are new, but every look-up takes longer
_BOOK_PAIRS = 60_000
_BOOK_SECONDS = 5.0  # an answer that others may have forgotten by then


class Flight:
    """The pairs that one window is the first to have, on their way.

    State: `levels` (0: none) and `refused` (why), by the pair's place; nothing of it changes once it is
    `over`. What is left without either then, those who wait for it ask for themselves.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.levels = bytearray(len(pairs))
        self.refused: dict[int, str] = {}
        self.over = asyncio.Event()
        # Not held: of those that nobody waits in any more there may be hundreds before it is over.
        self._entries: weakref.WeakKeyDictionary[Book, int] = weakref.WeakKeyDictionary()

    def entered(self, book: "Book", first: int) -> None:
        """The pairs have the numbers from `first` in that book."""
        self._entries[book] = first

    def part(self, places: Sequence[int]) -> list[Pair]:
        """The pairs at these places."""
        if isinstance(places, range):  # as nearly all are: a hundredth of a run's time is saved
            return self.pairs[places.start : places.stop]
        return [self.pairs[place] for place in places]

    def answer(self, places: Sequence[int], levels: bytes) -> None:
        """These are theirs."""
        if isinstance(places, range):
            self.levels[places.start : places.stop] = levels
            return
        for place, level in zip(places, levels, strict=True):
            self.levels[place] = level

    def end(self) -> None:
        """Whoever began it ends it, however that went."""
        for book, first in self._entries.items():
            book.levels[first : first + len(self.levels)] = self.levels
        if 0 in self.levels:
            for place, level in enumerate(self.levels):
                if not level and place not in self.refused:
                    for book in self._entries:
                        book.forget(self.pairs[place])
        self.over.set()


class Book:
    """Pairs by number, each with the flight that asks it.

    State: `_numbers` (of a pair that was left without an answer no longer; none once it is over), `levels`
    (by number; 0: not yet, or never), `_flights` and `_firsts` (the first number of each), in their order.
    """

    def __init__(self, carried: Iterable[Flight] = ()) -> None:
        self.levels = bytearray()
        self._numbers: defaultdict[Pair, int] = defaultdict(itertools.count().__next__)
        self._flights: list[Flight] = []
        self._firsts: list[int] = []
        for flight in carried:
            self._number(flight.pairs)
            self._add(flight)

    def __len__(self) -> int:
        return len(self._numbers)

    def numbered(self, pairs: Iterable[Pair]) -> tuple["array[int]", Flight]:
        """The number of each pair; and the flight of those that are new, for the caller to make and end."""
        known = len(self._numbers)
        try:
            which = self._number(pairs)
        except BaseException:  # of what makes the pairs as they are looked at
            self._begun(known).end()
            raise
        return which, self._begun(known)

    def _begun(self, known: int) -> Flight:
        new = list(itertools.islice(reversed(self._numbers), len(self._numbers) - known))
        new.reverse()
        flight = Flight(new)
        self._add(flight)
        return flight

    def _number(self, pairs: Iterable[Pair]) -> "array[int]":
        return array("I", map(self._numbers.__getitem__, pairs))  # a list would be pointers all over the heap

    def _add(self, flight: Flight) -> None:
        first = len(self.levels)
        flight.entered(self, first)
        self.levels += flight.levels
        self._flights.append(flight)
        self._firsts.append(first)

    def levels_of(self, which: "array[int]") -> bytes:
        """The level of each number, or 0."""
        return bytes(map(self.levels.__getitem__, which))

    def flight_of(self, number: int) -> tuple[Flight, int]:
        """Who asks it, and its place there."""
        at = bisect_right(self._firsts, number) - 1
        return self._flights[at], number - self._firsts[at]

    def forget(self, pair: Pair) -> None:
        """Whoever has it next asks it."""
        self._numbers.pop(pair, None)  # of a book that is over there is none

    def end(self) -> None:
        """Nothing more is numbered in it; whoever waits for answers has what that takes."""
        self._numbers.clear()

    def under_way(self) -> Sequence[Flight]:
        """The flights that are not over."""
        return [flight for flight in self._flights if not flight.over.is_set()]


class Books:
    """The book of what is in hand; begun anew when that is nothing, and so often that it stays small.

    State: `_book`, with the bytes of text that went into it, how many pairs it began with and when; `_files`
    in work.
    """

    def __init__(self) -> None:
        self._book = Book()
        self._bytes = 0
        self._carried = 0
        self._begun_at = time.monotonic()
        self._files = 0

    @contextmanager
    def file_in_work(self) -> Iterator[None]:
        """Around all that is asked for one file."""
        self._files += 1
        try:
            yield
        finally:
            self._files -= 1
            if not self._files:
                self._begin()

    def of(self, text_bytes: int) -> Book:
        """The book for so much more text."""
        new = len(self._book) - self._carried
        full = self._bytes + text_bytes > _BOOK_BYTES or new > _BOOK_PAIRS
        if full or time.monotonic() > self._begun_at + _BOOK_SECONDS:
            self._begin()
        self._bytes += text_bytes
        return self._book

    def _begin(self) -> None:
        self._book.end()  # who waits in it, and there may be one for each block in hand, needs no look-up
        self._book = Book(self._book.under_way())  # which nobody asks a second time
        self._bytes = 0
        self._carried = len(self._book)
        self._begun_at = time.monotonic()
