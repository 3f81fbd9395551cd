"""Entries: a level and the day it was inferred on, and how old it may be."""

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
    """Both come back, whether or not the entry is another version's; none is 0."""
    entry = pack_entry(level, day) | (FROM_PREVIOUS_VERSION if previous else 0)
    assert (entry_level(entry), entry_day(entry)) == (level, day)
    assert entry


def test_days_begin_at_midnight() -> None:
    """Day 0 is 2026-01-01 in UTC; a second before a midnight is still the day before."""
    assert [day_at(DAY_ZERO_SECONDS + seconds) for seconds in (0, DAY_SECONDS - 1, DAY_SECONDS)] == [0, 0, 1]


@given(level=LEVELS, day=DAYS, ttl=TTLS, age=st.integers(0, 8000))
def test_answer_is_fresh_for_its_time_to_live_and_no_longer(level: int, day: int, ttl: int, age: int) -> None:
    """It expires on one day for the look-up, for L1, and for what is served."""
    entry, lifetime = pack_entry(level, day), FreshnessPolicy(ttl)
    young = age < ttl
    assert lifetime.is_fresh(entry, day=day + age) is young
    assert (lifetime.expiry_day(entry) > day + age) is young
    assert lifetime.servable(entry, day=day + age) == (entry if young else 0)
    stale = FreshnessPolicy(ttl, serve_stale=True)
    assert stale.servable(entry, day=day + age) == entry
    assert stale.is_fresh(entry, day=day + age) is young


@given(level=LEVELS, day=DAYS, age=st.integers(0, 8000))
def test_answer_never_expires_without_a_time_to_live(level: int, day: int, age: int) -> None:
    """The default: any age is fresh, nothing is dropped."""
    entry, lifetime = pack_entry(level, day), FreshnessPolicy()
    assert lifetime.is_fresh(entry, day=day + age)
    assert lifetime.servable(entry, day=day + age) == entry
    assert lifetime.expiry_day(entry) == NO_EXPIRY
    assert lifetime.retention_days == 0


def test_unknown_pair_and_another_version_s_answer_are_never_fresh() -> None:
    """The one is not there, the other is served and refreshed."""
    for lifetime in (FreshnessPolicy(), FreshnessPolicy(30), FreshnessPolicy(30, serve_stale=True)):
        assert not lifetime.is_fresh(0, day=0)
        assert not lifetime.is_fresh(pack_entry(3, 5) | FROM_PREVIOUS_VERSION, day=5)


def test_stale_answers_are_kept_for_twice_their_time() -> None:
    """So that somebody may still ask for one."""
    assert (FreshnessPolicy(30).retention_days, FreshnessPolicy(30, serve_stale=True).retention_days) == (
        30,
        60,
    )
