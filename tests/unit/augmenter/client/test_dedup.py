"""The book of pairs in hand: nobody asks what another asks or has the answer to."""

import gc
import weakref
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.augmenter.client import dedup as books
from services.augmenter.client.dedup import InFlightBatch, PairDeduplicator, PairTable
from services.augmenter.pipeline.jsonl import Pair

_PAIRS = [Pair(company, "Clerk") for company in "abcdef"]
_ENDS = st.lists(st.sampled_from(["level", "refused", "nothing"]), min_size=len(_PAIRS), max_size=len(_PAIRS))
_Windows = st.lists(
    st.tuples(
        st.lists(st.sampled_from(_PAIRS), max_size=8),
        st.integers(0, 5),  # how many windows later its flight is over
        _ENDS,
        st.booleans(),  # whether a new book is begun before it
    ),
    max_size=12,
)


def _end(flight: InFlightBatch, ends: list[str]) -> None:
    """Settle each of a flight's pairs as its place in the alphabet says, and end it."""
    for place, pair in enumerate(flight.pairs):
        end = ends[_PAIRS.index(pair)]
        if end == "level":
            flight.levels[place] = 1 + _PAIRS.index(pair)
        elif end == "refused":
            flight.rejected[place] = pair.company
    flight.finish()


@given(_Windows)
def test_a_pair_is_on_one_way_at_a_time_and_its_level_is_everywhere(
    windows: list[tuple[list[Pair], int, list[str], bool]],
) -> None:
    """Whatever is asked, ends, begins anew: never two flights with a pair; a number has its pair's level."""
    book = PairTable()
    flying: list[tuple[int, InFlightBatch, list[str]]] = []
    seen: list[tuple[PairTable, list[Pair], array[int]]] = []
    for now, (pairs, takes, ends, anew) in enumerate(windows):
        for due, flight, its_ends in flying:
            if due == now:
                _end(flight, its_ends)
        flying = [one for one in flying if one[0] > now]
        if anew:
            book = PairTable(book.pending())
        which, flight = book.assign_ids(pairs)
        flying.append((now + 1 + takes, flight, ends))
        seen.append((book, pairs, which))
        on_their_way = [pair for _, one, _ in flying for pair in one.pairs]
        assert len(on_their_way) == len(set(on_their_way))
    for _, flight, ends in flying:
        _end(flight, ends)
    for book, pairs, which in seen:
        levels = book.get_levels(which)
        for pair, number, level in zip(pairs, which, levels, strict=True):
            flight, place = book.find_batch(number)
            assert flight.finished.is_set()
            assert flight.pairs[place] == pair
            assert level == flight.levels[place]
            assert level in {0, 1 + _PAIRS.index(pair)}


def test_what_is_answered_or_refused_is_not_asked_again_and_what_is_left_is() -> None:
    """The three ends of a pair, as the next window has them."""
    book = PairTable()
    _, flight = book.assign_ids(_PAIRS[:3])
    _end(flight, ["level", "refused", "nothing", "", "", ""])
    which, again = book.assign_ids(_PAIRS[:3])
    assert again.pairs == [_PAIRS[2]]
    assert book.get_levels(which) == b"\1\0\0"
    refused, place = book.find_batch(which[1])
    assert refused.rejected == {place: "b"}


def test_a_book_ends_with_the_last_file_in_work() -> None:
    """Answers are kept for what is in hand, no longer: the next run's file asks anew."""
    all_books = PairDeduplicator()
    with all_books.track_file():
        with all_books.track_file():
            first = all_books.table_for(1)
        assert all_books.table_for(1) is first
    assert all_books.table_for(1) is not first


def test_what_fails_while_it_is_numbered_leaves_nobody_waiting() -> None:
    """Pairs of lines that were parsed before an error of ours are new again to the next who has them."""

    def pairs() -> Iterator[Pair]:
        yield from _PAIRS[:2]
        raise MemoryError

    book = PairTable()
    _, first = book.assign_ids(_PAIRS[:1])
    with pytest.raises(MemoryError):
        book.assign_ids(pairs())
    which, flight = book.assign_ids(_PAIRS[:3])
    assert flight.pairs == _PAIRS[1:3]
    _end(first, ["level"] * len(_PAIRS))
    _end(flight, ["level"] * len(_PAIRS))
    assert book.get_levels(which) == b"\1\2\3"


def test_a_book_is_gone_as_soon_as_nobody_needs_it() -> None:
    """Without the garbage collector, which comes round seldom: a book is megabytes."""
    book = PairTable()
    _, flight = book.assign_ids(_PAIRS)
    later = PairTable(book.pending())
    gone = weakref.ref(book)
    _end(flight, ["level"] * len(_PAIRS))
    gc.disable()
    try:
        del book
        assert gone() is None
    finally:
        gc.enable()
    assert len(later) == len(_PAIRS)


def test_a_flight_that_goes_on_holds_no_book(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair may wait for minutes, while a hundred other books begin and end around it."""
    monkeypatch.setattr(books, "_MAX_TABLE_TEXT_BYTES", 0)
    all_books = PairDeduplicator()
    with all_books.track_file():
        which, flight = all_books.table_for(1).assign_ids(_PAIRS[:1])
        gone = weakref.ref(all_books.table_for(1))
        gc.disable()
        try:
            later = all_books.table_for(1)
            assert gone() is None
        finally:
            gc.enable()
        _end(flight, ["level"] * len(_PAIRS))
        assert later.get_levels(which) == b"\1"


def test_a_book_that_is_over_holds_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for its answers gets them, but the look-up, most of its bytes, is the next one's alone."""
    monkeypatch.setattr(books, "_MAX_TABLE_TEXT_BYTES", 0)
    all_books = PairDeduplicator()
    with all_books.track_file():
        first = all_books.table_for(1)
        which, flight = first.assign_ids(_PAIRS)
        later = all_books.table_for(1)
        assert (len(first), len(later)) == (0, len(_PAIRS))
        _end(flight, ["level", "nothing", "refused", "level", "level", "level"])
        assert first.get_levels(which) == later.get_levels(which) == b"\1\0\0\4\5\6"
        assert later.assign_ids(_PAIRS)[1].pairs == _PAIRS[1:2]


def test_what_was_carried_into_a_book_does_not_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or, with more on its way than a book should hold, each window would begin one and carry it all."""
    all_books = PairDeduplicator()
    with all_books.track_file():
        all_books.table_for(1).assign_ids(_PAIRS[:4])
        monkeypatch.setattr(books, "_MAX_TABLE_PAIRS", 1)
        second = all_books.table_for(1)
        second.assign_ids(_PAIRS[:5])
        assert all_books.table_for(1) is second
        second.assign_ids(_PAIRS)
        assert all_books.table_for(1) is not second


@pytest.mark.parametrize(
    ("name", "most"), [("_MAX_TABLE_TEXT_BYTES", 9), ("_MAX_TABLE_PAIRS", 2), ("_MAX_TABLE_SECONDS", -1.0)]
)
def test_a_book_has_an_end(monkeypatch: pytest.MonkeyPatch, name: str, most: float) -> None:
    """Bytes, pairs or seconds are used up: a new one, in which what is on its way still is."""
    all_books = PairDeduplicator()
    with all_books.track_file():
        first = all_books.table_for(5)
        _, over = first.assign_ids(_PAIRS[:1])
        _end(over, ["level"] * len(_PAIRS))
        _, flight = first.assign_ids(_PAIRS[1:4])
        assert all_books.table_for(3) is first
        monkeypatch.setattr(books, name, most)
        second = all_books.table_for(2)
        assert second is not first
        which, new = second.assign_ids(_PAIRS[:4])
        assert new.pairs == _PAIRS[:1]
        _end(flight, ["level"] * len(_PAIRS))
        _end(new, ["level"] * len(_PAIRS))
        assert second.get_levels(which) == b"\1\2\3\4"
