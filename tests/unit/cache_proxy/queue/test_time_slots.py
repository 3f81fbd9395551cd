"""Tests of the time slots of replicas without Redis: never another's, and never too close."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from services.cache_proxy.queue.local.call_limiter import RateLimiter
from services.cache_proxy.queue.time_slots import Membership, TimeSlotLimiter

LATE_SECONDS = 0.010


def _share() -> RateLimiter:
    return RateLimiter(pairs_per_second=0, calls_per_second=2, burst=1, now=0.0)


def _limiter(replica: str, members: tuple[str, ...], apart: float, offset: float) -> TimeSlotLimiter:
    limiter = TimeSlotLimiter(_share())
    limiter.update_membership(Membership(replica, members, apart, offset))
    return limiter


def _calls(limiter: TimeSlotLimiter, *, begin: float, seconds: float, delays: list[float]) -> list[float]:
    """Return when a dispatcher with a backlog calls, if it wakes up a little late every time."""
    now = begin
    made: list[float] = []
    while now < begin + seconds:
        wait = limiter.wait_seconds(1, now=now)
        if wait > 0:
            now += wait + delays[len(made) % len(delays)]
            if limiter.wait_seconds(1, now=now) > 0:
                continue
        limiter.consume(1, now=now)
        made.append(now)
    return made


@given(
    st.integers(1, 5),
    st.integers(10, 3000),
    st.lists(st.floats(-1e6, 2e9), min_size=5, max_size=5),
    st.lists(st.floats(0, 0.009), min_size=1, max_size=5),
)
def test_members_never_share_a_slot(
    count: int, moment_ms: int, offsets: list[float], delays: list[float]
) -> None:
    """Whatever their own clocks read, calls are a slot apart on Redis's clock, minus one call's lateness."""
    members = tuple(f"replica {number}" for number in range(count))
    apart = moment_ms / 1000
    calls = []
    for member, offset in zip(members, offsets, strict=False):
        limiter = _limiter(member, members, apart, offset)
        # This is the same time on Redis's clock for all.
        begin = 2e9 - offset
        mine = _calls(limiter, begin=begin, seconds=max(8 * apart, 2.5 * count), delays=delays)
        assert all(later - earlier >= apart - 1e-5 for earlier, later in pairwise(mine))
        calls += [at + offset for at in mine]
    calls.sort()
    assert calls
    for earlier, later in pairwise(calls):
        assert later - earlier >= apart - LATE_SECONDS - 1e-5
    if apart > LATE_SECONDS:
        moments = [math.floor((at + 1e-5) / apart) for at in calls]
        assert len(set(moments)) == len(moments)


@given(st.integers(20, 1000), st.integers(2, 4))
def test_close_slots_of_two_members_have_a_guard_slot_between(moment_ms: int, count: int) -> None:
    """A late call at the end of one turn and a punctual one at the start of the next stay apart."""
    members = tuple(f"replica {number}" for number in range(count))
    apart = moment_ms / 1000
    calls = []
    for member in members:
        calls += [
            (at, member)
            for at in _calls(
                _limiter(member, members, apart, 0.0), begin=1e9, seconds=6.0, delays=[0.0, 0.0099, 0.004]
            )
        ]
    calls.sort()
    for (earlier, one), (later, other) in pairwise(calls):
        if one != other:
            assert (
                later - earlier
                >= min(apart, apart * 2 - LATE_SECONDS) - (LATE_SECONDS if apart > 0.3 else 0) - 1e-5
            )


def test_all_members_together_use_the_rate() -> None:
    """Two replicas at one call a second lose only the tolerance for their clocks."""
    calls = []
    for member in "ab":
        calls += _calls(_limiter(member, ("a", "b"), 1.05, 0.0), begin=1e9, seconds=105.0, delays=[0.002])
    # The windows of the two end at different times.
    assert 98 <= len(calls) <= 102


def test_replica_that_is_no_member_has_no_slots() -> None:
    """It started while a member was silent, and waits for Redis."""
    assert _limiter("new", ("a", "b"), 1.0, 0.0).wait_seconds(1, now=5.0) == math.inf


def test_replica_without_membership_keeps_to_its_share_of_the_rate() -> None:
    """The share's limiter decides."""
    limiter, share = TimeSlotLimiter(_share()), _share()
    assert limiter.slot_seconds == share.slot_seconds
    assert limiter.wait_seconds(1, now=0.0) == share.wait_seconds(1, now=0.0)
    limiter.consume(1, now=2.0)
    share.consume(1, now=2.0)
    assert limiter.wait_seconds(1, now=2.0) == share.wait_seconds(1, now=2.0) > 0


def test_no_call_before_grace_period_and_pushback_end() -> None:
    """Slots of its own are left out, too."""
    limiter = _limiter("a", ("a",), 0.1, 0.0)
    limiter.not_before = 100.0
    assert limiter.wait_seconds(1, now=98.0) >= 2.0
    limiter.block_until(105.0)
    assert limiter.wait_seconds(1, now=98.0) >= 7.0
    # There is no rate limit.
    limiter = _limiter("a", ("a",), 0.0, 0.0)
    limiter.block_until(105.0)
    assert limiter.wait_seconds(1, now=98.0) == 7.0
    assert limiter.wait_seconds(1, now=106.0) == 0
    limiter.consume(1, now=106.0)
    limiter.refund(1)
    assert limiter.wait_seconds(1, now=106.0) == 0


def test_changed_interval_or_clock_does_not_stop_calls() -> None:
    """Redis is lost again under another limit, or after a failover to a clock that is behind."""
    limiter = _limiter("a", ("a",), 0.05, 1e9)
    limiter.consume(1, now=10.0)
    limiter.update_membership(Membership("a", ("a",), 1.0, 1e9))
    assert limiter.wait_seconds(1, now=20.0) <= 1.0
    limiter.consume(1, now=20.0)
    limiter.update_membership(Membership("a", ("a",), 1.0, 1e9 - 3600))
    assert limiter.wait_seconds(1, now=30.0) <= 1.0


def test_slot_seconds_cover_slots_of_all_members() -> None:
    """A member's batches are as far apart as one slot of each member."""
    assert _limiter("a", ("a", "b", "c"), 1.05, 0.0).slot_seconds == 1.05 * 3


def test_replica_that_is_no_member_may_call_without_a_limit() -> None:
    """Redis was lost between its first heartbeat and the others' next ones."""
    assert _limiter("new", ("a", "b"), 0.0, 0.0).wait_seconds(1, now=5.0) == 0.0
