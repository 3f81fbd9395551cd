"""The limit of a replica that lost Redis: moments of its own, on the last known clock of Redis.

Moments are `moment_seconds` apart, a little more than full batches are. The members, in the order that all of
them last heard, have them in turn, a block of about a second each. So no two of them ever call at the same
time, and together they keep the limit without a word. Those who still have Redis leave the moments of the
silent alone (`claim.lua`). A replica that never saw Redis has no moments: it keeps to its share of the rate.
"""

import math
from dataclasses import dataclass

from services.cache_proxy.queue.local.call_limiter import RateLimiter

_SLOT_JITTER_SECONDS = 0.010
_MAX_SLOT_DELAY_SECONDS = 0.020
_ADMISSION_SECONDS = 3.0  # in which a replica that stands by becomes a member
_MIN_SLOTS_FOR_GUARD = 2  # in a block: then the room in each is more than a late call needs


@dataclass(frozen=True, slots=True)
class Membership:
    """What a replica last heard: `clock_offset_seconds` is Redis's clock less time.monotonic."""

    replica: str
    members: tuple[str, ...]
    slot_interval_seconds: float
    clock_offset_seconds: float


class TimeSlotLimiter:
    """`Limiter`'s interface. State: the membership, and when a moment was last used."""

    def __init__(self, share_limiter: RateLimiter) -> None:
        self._share_limiter = share_limiter
        self._membership: Membership | None = None
        self._last_slot_used_at = -math.inf
        self._backoff_until = 0.0
        self._stands_by = False
        self.not_before = 0.0

    def update_membership(self, membership: Membership) -> None:
        """Note what was heard."""
        self._membership = membership
        self._stands_by = False

    def stand_by(self, membership: Membership | None = None) -> bool:
        """Have moments beside replicas of another queue format. Return whether they changed.

        Until the others have admitted it as a member it has none: they use the whole limit.
        """
        known = self._membership
        if membership is None:
            membership = known or Membership("", (), self._share_limiter.slot_seconds, 0.0)
        self._membership = membership
        self._stands_by = True
        return known is None or known.members != membership.members

    @property
    def replicas(self) -> int:
        """How many share what there is, as was last heard; 0 if nothing was."""
        return 0 if self._membership is None else max(1, len(self._membership.members))

    @property
    def slot_seconds(self) -> float:
        """How far apart this replica's batches are."""
        if self._membership is None:
            return self._share_limiter.slot_seconds
        return self._membership.slot_interval_seconds * max(1, len(self._membership.members))

    def wait_seconds(self, pairs: int, *, now: float) -> float:
        """How long until a call is allowed; 0 if now, `inf` if never."""
        if self._membership is None:
            return self._share_limiter.wait_seconds(pairs, now=now)
        held = max(self.not_before, self._backoff_until) - now
        if (
            self._membership.slot_interval_seconds == 0
        ):  # no limit, so also none for a replica that is no member yet
            return max(0.0, held)
        if self._membership.replica not in self._membership.members:
            return _ADMISSION_SECONDS if self._stands_by else math.inf
        earliest = max(now, now + held, self._last_slot_used_at + self._membership.slot_interval_seconds)
        moment = self._next_slot_index(earliest, self._membership)
        starts_at = moment * self._membership.slot_interval_seconds - self._membership.clock_offset_seconds
        return max(0.0, earliest - now, starts_at - now)

    def consume(self, pairs: int, *, now: float) -> None:
        """Use the moment."""
        self._share_limiter.consume(pairs, now=now)
        if self._membership is not None and self._membership.slot_interval_seconds:
            self._last_slot_used_at = now

    def refund(self, pairs: int) -> None:
        """A moment that was not used is over."""

    def postpone(self, seconds: float) -> bool:
        """A moment has some room, and is another's after that."""
        if self._membership is None:
            return self._share_limiter.postpone(seconds)
        return seconds <= _MAX_SLOT_DELAY_SECONDS

    def block_until(self, not_before: float) -> None:
        """See `CallLimiter.hold_until`."""
        self._backoff_until = not_before
        self._share_limiter.block_until(not_before)

    def _next_slot_index(self, now: float, membership: Membership) -> int:
        """The first of this replica's moments that is not over."""
        apart, members = membership.slot_interval_seconds, membership.members
        block = math.ceil(1000 / round(apart * 1000))
        moment = math.floor((now + membership.clock_offset_seconds - _SLOT_JITTER_SECONDS) / apart) + 1
        turn = members.index(membership.replica)
        while moment // block % len(members) != turn or _is_guard_slot(moment, block):
            moment = moment + 1 if moment // block % len(members) == turn else (moment // block + 1) * block
        return moment


def _is_guard_slot(slot_index: int, slots_per_turn: int) -> bool:
    """Whether it is left free, so that a late call of one member keeps apart from the next one's first.

    Moments far apart need none: the room that is in each is more than any lateness.
    """
    return slots_per_turn > _MIN_SLOTS_FOR_GUARD and slot_index % slots_per_turn == slots_per_turn - 1
