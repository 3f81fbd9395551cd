"""The moments in which a replica without Redis calls the model: never another's, never too close."""

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
    """When a dispatcher with a backlog calls that wakes up a little late every time."""
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
def test_no_two_members_ever_have_the_same_moment(
    count: int, moment_ms: int, offsets: list[float], delays: list[float]
) -> None:
    """Whatever each one's clock reads: on Redis's, calls are a moment apart, less a late one's lateness."""
    members = tuple(f"replica {number}" for number in range(count))
    apart = moment_ms / 1000
    calls = []
    for member, offset in zip(members, offsets, strict=False):
        limiter = _limiter(member, members, apart, offset)
        begin = 2e9 - offset  # the same time for all
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
def test_close_moments_of_two_members_have_one_free_between_them(moment_ms: int, count: int) -> None:
    """Where one's block ends and the next one's begins, a late call and a punctual one keep apart."""
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
    """Two replicas at one call a second: nothing is lost but the room for their clocks."""
    calls = []
    for member in "ab":
        calls += _calls(_limiter(member, ("a", "b"), 1.05, 0.0), begin=1e9, seconds=105.0, delays=[0.002])
    assert 98 <= len(calls) <= 102  # the windows of the two end at different moments


def test_a_replica_that_nobody_knows_has_no_moments() -> None:
    """It came while somebody was silent: it waits for Redis."""
    assert _limiter("new", ("a", "b"), 1.0, 0.0).wait_seconds(1, now=5.0) == math.inf


def test_a_replica_that_never_saw_redis_keeps_to_its_share() -> None:
    """Its limiter is that of its share of the rate."""
    limiter, share = TimeSlotLimiter(_share()), _share()
    assert limiter.slot_seconds == share.slot_seconds
    assert limiter.wait_seconds(1, now=0.0) == share.wait_seconds(1, now=0.0)
    limiter.consume(1, now=2.0)
    share.consume(1, now=2.0)
    assert limiter.wait_seconds(1, now=2.0) == share.wait_seconds(1, now=2.0) > 0


def test_no_call_before_the_others_know_or_the_model_wants_one() -> None:
    """For a while after the loss, and after the model's pushback, even an own moment is left out."""
    limiter = _limiter("a", ("a",), 0.1, 0.0)
    limiter.not_before = 100.0
    assert limiter.wait_seconds(1, now=98.0) >= 2.0
    limiter.block_until(105.0)
    assert limiter.wait_seconds(1, now=98.0) >= 7.0
    limiter = _limiter("a", ("a",), 0.0, 0.0)  # no limit at all
    limiter.block_until(105.0)
    assert limiter.wait_seconds(1, now=98.0) == 7.0
    assert limiter.wait_seconds(1, now=106.0) == 0
    limiter.consume(1, now=106.0)
    limiter.refund(1)
    assert limiter.wait_seconds(1, now=106.0) == 0


def test_moments_that_became_fewer_or_another_clocks_do_not_stop_it() -> None:
    """Lost a second time, under another limit or after a failover to a clock that is behind: it goes on."""
    limiter = _limiter("a", ("a",), 0.05, 1e9)
    limiter.consume(1, now=10.0)
    limiter.update_membership(Membership("a", ("a",), 1.0, 1e9))
    assert limiter.wait_seconds(1, now=20.0) <= 1.0
    limiter.consume(1, now=20.0)
    limiter.update_membership(Membership("a", ("a",), 1.0, 1e9 - 3600))
    assert limiter.wait_seconds(1, now=30.0) <= 1.0


def test_how_far_apart_a_members_batches_are() -> None:
    """As far as all members' moments together."""
    assert _limiter("a", ("a", "b", "c"), 1.05, 0.0).slot_seconds == 1.05 * 3


def test_a_replica_that_is_no_member_yet_may_call_where_nothing_is_limited() -> None:
    """Redis was lost between its first heartbeat and the others' next: there is no limit to keep."""
    assert _limiter("new", ("a", "b"), 0.0, 0.0).wait_seconds(1, now=5.0) == 0.0
