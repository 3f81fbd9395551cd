"""Entries: packing of level and day, and the decision whether an entry is fresh."""

from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.cache.entry import (
    DAY_ZERO_SECONDS,
    FROM_PREVIOUS_VERSION,
    NO_EXPIRY,
    FreshnessPolicy,
    day_at,
    entry_day,
    entry_level,
    pack_entry,
)
from services.cache_proxy.domain import DAY_SECONDS

LEVELS = st.integers(1, 7)
DAYS = st.integers(0, 8191)
TTLS = st.integers(1, 3650)


@given(level=LEVELS, day=DAYS, previous=st.booleans())
def test_entry_holds_level_and_day(level: int, day: int, *, previous: bool) -> None:
    """Level and day are unpacked, also from an entry of the previous version; no entry is 0."""
    entry = pack_entry(level, day) | (FROM_PREVIOUS_VERSION if previous else 0)
    assert (entry_level(entry), entry_day(entry)) == (level, day)
    assert entry


def test_day_begins_at_midnight_utc() -> None:
    """Day 0 is 2026-01-01 in UTC; a second before midnight is still the day before."""
    assert [day_at(DAY_ZERO_SECONDS + seconds) for seconds in (0, DAY_SECONDS - 1, DAY_SECONDS)] == [0, 0, 1]


@given(level=LEVELS, day=DAYS, ttl=TTLS, age=st.integers(0, 8000))
def test_answer_is_fresh_only_within_its_time_to_live(level: int, day: int, ttl: int, age: int) -> None:
    """Look-up, L1 and the decision what to serve agree on the day of expiry."""
    entry = pack_entry(level, day)
    policy = FreshnessPolicy(ttl)
    is_fresh = age < ttl
    assert policy.is_fresh(entry, day=day + age) is is_fresh
    assert (policy.expiry_day(entry) > day + age) is is_fresh
    assert policy.servable(entry, day=day + age) == (entry if is_fresh else 0)
    stale_policy = FreshnessPolicy(ttl, serve_stale=True)
    assert stale_policy.servable(entry, day=day + age) == entry
    assert stale_policy.is_fresh(entry, day=day + age) is is_fresh


@given(level=LEVELS, day=DAYS, age=st.integers(0, 8000))
def test_answer_without_time_to_live_never_expires(level: int, day: int, age: int) -> None:
    """By default, answers of any age are fresh and none is deleted."""
    entry = pack_entry(level, day)
    policy = FreshnessPolicy()
    assert policy.is_fresh(entry, day=day + age)
    assert policy.servable(entry, day=day + age) == entry
    assert policy.expiry_day(entry) == NO_EXPIRY
    assert policy.retention_days == 0


def test_unknown_pair_and_answer_of_previous_version_are_never_fresh() -> None:
    """The first is a miss; the second is served and refreshed."""
    for policy in (FreshnessPolicy(), FreshnessPolicy(30), FreshnessPolicy(30, serve_stale=True)):
        assert not policy.is_fresh(0, day=0)
        assert not policy.is_fresh(pack_entry(3, 5) | FROM_PREVIOUS_VERSION, day=5)


def test_stale_answers_are_retained_twice_as_long() -> None:
    """There is time to request an answer that is served stale."""
    assert FreshnessPolicy(30).retention_days == 30
    assert FreshnessPolicy(30, serve_stale=True).retention_days == 60
