"""Tests of the deduplication of pairs: no pair is sent while it is in-flight or has a level."""

import gc
import weakref
from array import array
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.augmenter.client import dedup
from services.augmenter.client.dedup import InFlightBatch, PairDeduplicator, PairTable
from services.augmenter.domain import Pair

_PAIRS = [Pair(company, "Clerk") for company in "abcdef"]
_OUTCOMES = st.lists(
    st.sampled_from(["level", "refused", "nothing"]), min_size=len(_PAIRS), max_size=len(_PAIRS)
)
_BLOCKS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(_PAIRS), max_size=8),
        # After how many more blocks its batch is finished.
        st.integers(0, 5),
        _OUTCOMES,
        # Whether a new table is started before it.
        st.booleans(),
    ),
    max_size=12,
)


def _finish(batch: InFlightBatch, outcomes: list[str]) -> None:
    """Give each pair of a batch its outcome, by its letter, and finish the batch."""
    for index, pair in enumerate(batch.pairs):
        outcome = outcomes[_PAIRS.index(pair)]
        if outcome == "level":
            batch.levels[index] = 1 + _PAIRS.index(pair)
        elif outcome == "refused":
            batch.rejected[index] = pair.company
    batch.finish()


@given(_BLOCKS)
def test_pair_is_in_one_unfinished_batch_and_its_level_reaches_every_table(
    blocks: list[tuple[list[Pair], int, list[str], bool]],
) -> None:
    """A pair is never in two unfinished batches, and each table has its level under the pair's id."""
    table = PairTable()
    in_flight: list[tuple[int, InFlightBatch, list[str]]] = []
    seen: list[tuple[PairTable, list[Pair], array[int]]] = []
    for now, (pairs, duration, outcomes, is_new_table) in enumerate(blocks):
        for due, batch, batch_outcomes in in_flight:
            if due == now:
                _finish(batch, batch_outcomes)
        in_flight = [entry for entry in in_flight if entry[0] > now]
        if is_new_table:
            table = PairTable(table.pending())
        ids, batch = table.assign_ids(pairs)
        in_flight.append((now + 1 + duration, batch, outcomes))
        seen.append((table, pairs, ids))
        unfinished_pairs = [pair for _, entry, _ in in_flight for pair in entry.pairs]
        assert len(unfinished_pairs) == len(set(unfinished_pairs))
    for _, batch, outcomes in in_flight:
        _finish(batch, outcomes)
    for table, pairs, ids in seen:
        levels = table.get_levels(ids)
        for pair, pair_id, level in zip(pairs, ids, levels, strict=True):
            batch, index = table.find_batch(pair_id)
            assert batch.finished.is_set()
            assert batch.pairs[index] == pair
            assert level == batch.levels[index]
            assert level in {0, 1 + _PAIRS.index(pair)}


def test_only_failed_pair_is_sent_again() -> None:
    """A pair that failed is sent again by the next block, but not one with a level or a rejection."""
    table = PairTable()
    _, batch = table.assign_ids(_PAIRS[:3])
    _finish(batch, ["level", "refused", "nothing", "", "", ""])
    ids, next_batch = table.assign_ids(_PAIRS[:3])
    assert next_batch.pairs == [_PAIRS[2]]
    assert table.get_levels(ids) == b"\1\0\0"
    rejected_batch, index = table.find_batch(ids[1])
    assert rejected_batch.rejected == {index: "b"}


def test_table_is_replaced_after_last_file() -> None:
    """Levels are kept only while a file is in progress: the next run's file sends its pairs again."""
    deduplicator = PairDeduplicator()
    with deduplicator.track_file():
        with deduplicator.track_file():
            first = deduplicator.table_for(1)
        assert deduplicator.table_for(1) is first
    assert deduplicator.table_for(1) is not first


def test_pairs_are_sent_again_when_their_iterable_fails() -> None:
    """If parsing fails after some pairs have ids, the next block that has these pairs sends them."""

    def pairs() -> Iterator[Pair]:
        yield from _PAIRS[:2]
        raise MemoryError

    table = PairTable()
    _, first_batch = table.assign_ids(_PAIRS[:1])
    with pytest.raises(MemoryError):
        table.assign_ids(pairs())
    ids, batch = table.assign_ids(_PAIRS[:3])
    assert batch.pairs == _PAIRS[1:3]
    _finish(first_batch, ["level"] * len(_PAIRS))
    _finish(batch, ["level"] * len(_PAIRS))
    assert table.get_levels(ids) == b"\1\2\3"


def test_replaced_table_is_freed_without_garbage_collection() -> None:
    """A replaced table is freed by reference counting: it takes megabytes, and the collector runs rarely."""
    table = PairTable()
    _, batch = table.assign_ids(_PAIRS)
    later = PairTable(table.pending())
    reference = weakref.ref(table)
    _finish(batch, ["level"] * len(_PAIRS))
    gc.disable()
    try:
        del table
        assert reference() is None
    finally:
        gc.enable()
    assert len(later) == len(_PAIRS)


def test_unfinished_batch_does_not_keep_tables_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that waits for minutes holds no reference to the many tables that come and go meanwhile."""
    monkeypatch.setattr(dedup, "_MAX_TABLE_TEXT_BYTES", 0)
    deduplicator = PairDeduplicator()
    with deduplicator.track_file():
        ids, batch = deduplicator.table_for(1).assign_ids(_PAIRS[:1])
        reference = weakref.ref(deduplicator.table_for(1))
        gc.disable()
        try:
            later = deduplicator.table_for(1)
            assert reference() is None
        finally:
            gc.enable()
        _finish(batch, ["level"] * len(_PAIRS))
        assert later.get_levels(ids) == b"\1"


def test_closed_table_has_levels_but_no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed table still returns levels by id, but its look-up, most of its memory, is dropped."""
    monkeypatch.setattr(dedup, "_MAX_TABLE_TEXT_BYTES", 0)
    deduplicator = PairDeduplicator()
    with deduplicator.track_file():
        first = deduplicator.table_for(1)
        ids, batch = first.assign_ids(_PAIRS)
        later = deduplicator.table_for(1)
        assert (len(first), len(later)) == (0, len(_PAIRS))
        _finish(batch, ["level", "nothing", "refused", "level", "level", "level"])
        assert first.get_levels(ids) == later.get_levels(ids) == b"\1\0\0\4\5\6"
        assert later.assign_ids(_PAIRS)[1].pairs == _PAIRS[1:2]


def test_inherited_pairs_do_not_fill_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In-flight pairs that a table inherits do not count against its limit of pairs.

    Otherwise, with more in-flight pairs than a table may hold, each block would start a new table.
    """
    deduplicator = PairDeduplicator()
    with deduplicator.track_file():
        deduplicator.table_for(1).assign_ids(_PAIRS[:4])
        monkeypatch.setattr(dedup, "_MAX_TABLE_PAIRS", 1)
        second = deduplicator.table_for(1)
        second.assign_ids(_PAIRS[:5])
        assert deduplicator.table_for(1) is second
        second.assign_ids(_PAIRS)
        assert deduplicator.table_for(1) is not second


@pytest.mark.parametrize(
    ("name", "limit"), [("_MAX_TABLE_TEXT_BYTES", 9), ("_MAX_TABLE_PAIRS", 2), ("_MAX_TABLE_SECONDS", -1.0)]
)
def test_table_is_replaced_at_its_limit(monkeypatch: pytest.MonkeyPatch, name: str, limit: float) -> None:
    """At its limit of bytes, pairs or seconds, a table is replaced by one with the in-flight pairs."""
    deduplicator = PairDeduplicator()
    with deduplicator.track_file():
        first = deduplicator.table_for(5)
        _, finished_batch = first.assign_ids(_PAIRS[:1])
        _finish(finished_batch, ["level"] * len(_PAIRS))
        _, batch = first.assign_ids(_PAIRS[1:4])
        assert deduplicator.table_for(3) is first
        monkeypatch.setattr(dedup, name, limit)
        second = deduplicator.table_for(2)
        assert second is not first
        ids, new_batch = second.assign_ids(_PAIRS[:4])
        assert new_batch.pairs == _PAIRS[:1]
        _finish(batch, ["level"] * len(_PAIRS))
        _finish(new_batch, ["level"] * len(_PAIRS))
        assert second.get_levels(ids) == b"\1\2\3\4"
