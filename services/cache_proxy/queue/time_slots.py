"""Rate limit of a replica that lost Redis: it calls the model only in time slots of its own.

Slots follow each other on Redis's clock as the replica last knew it, `slot_interval_seconds` apart, which is
a little more than the interval of full batches. The members take turns, in the order that all of them know
from their last heartbeats, with a block of slots of about a second each. So two members never call at the
same time, and together they keep the limit without any communication. Members that still have Redis leave
the slots of silent members free (`claim.lua`). A replica that never reached Redis has no slots: it keeps to
its share of the rate.
"""

import math
from dataclasses import dataclass

from services.cache_proxy.queue.local.call_limiter import CallLimiter, RateLimiter
from services.common.compat import override

_SLOT_JITTER_SECONDS = 0.010
_MAX_SLOT_DELAY_SECONDS = 0.020

# The time in which a replica on standby becomes a member.
_ADMISSION_SECONDS = 3.0

# With no more slots than this in a turn, the time between two slots is more than a late call needs.
_MIN_SLOTS_FOR_GUARD = 2


@dataclass(frozen=True, slots=True)
class Membership:
    """What a replica's last heartbeat showed of the members that share the slots.

    `clock_offset_seconds` is Redis's clock minus time.monotonic.
    """

    replica: str
    members: tuple[str, ...]
    slot_interval_seconds: float
    clock_offset_seconds: float


class TimeSlotLimiter(CallLimiter):
    """Limiter for one member.

    State, touched only from the event loop:

    - `_membership`: None before the first heartbeat. Then `_share_limiter` decides.
    - `_is_on_standby`: the shared queue has another format, and the replica is a member beside it.
    - `_last_slot_used_at`: when it last called.
    - `not_before` and `_backoff_until`: no call before these times. The first is set at heartbeats and
      failovers, the second after failed calls.
    """

    def __init__(self, share_limiter: RateLimiter) -> None:
        self._share_limiter = share_limiter
        self._membership: Membership | None = None
        self._is_on_standby = False
        self._last_slot_used_at = -math.inf
        self._backoff_until = 0.0
        self.not_before = 0.0

    def update_membership(self, membership: Membership) -> None:
        """Record the membership that a heartbeat brought."""
        self._membership = membership
        self._is_on_standby = False

    def stand_by(self, membership: Membership | None = None) -> bool:
        """Use slots beside replicas of another queue format. Return whether the members changed.

        Until the others have admitted this replica as a member it has no slots: they use the whole limit.
        """
        known = self._membership
        if membership is None:
            membership = known or Membership("", (), self._share_limiter.slot_seconds, 0.0)
        self._membership = membership
        self._is_on_standby = True
        return known is None or known.members != membership.members

    @property
    def replicas(self) -> int:
        """Return the number of members as last known, 0 before the first heartbeat."""
        return 0 if self._membership is None else max(1, len(self._membership.members))

    @property
    @override
    def slot_seconds(self) -> float:
        if self._membership is None:
            return self._share_limiter.slot_seconds
        return self._membership.slot_interval_seconds * max(1, len(self._membership.members))

    @override
    def wait_seconds(self, pairs: int, *, now: float) -> float:
        # It is infinite for a replica that is no member, since it has no slot.
        membership = self._membership
        if membership is None:
            return self._share_limiter.wait_seconds(pairs, now=now)
        blocked_seconds = max(self.not_before, self._backoff_until) - now
        # Without a limit there are no slots, so a replica that is no member yet may call, too.
        if membership.slot_interval_seconds == 0:
            return max(0.0, blocked_seconds)
        if membership.replica not in membership.members:
            return _ADMISSION_SECONDS if self._is_on_standby else math.inf
        earliest = max(now, now + blocked_seconds, self._last_slot_used_at + membership.slot_interval_seconds)
        slot_index = self._next_slot_index(earliest, membership)
        slot_at = slot_index * membership.slot_interval_seconds - membership.clock_offset_seconds
        return max(0.0, earliest - now, slot_at - now)

    @override
    def consume(self, pairs: int, *, now: float) -> None:
        self._share_limiter.consume(pairs, now=now)
        if self._membership is not None and self._membership.slot_interval_seconds:
            self._last_slot_used_at = now

    @override
    def refund(self, pairs: int) -> None:
        # A slot that was not used has passed.
        pass

    @override
    def postpone(self, seconds: float) -> bool:
        # A call may be a little late in its slot. After that the slot may be another member's.
        if self._membership is None:
            return self._share_limiter.postpone(seconds)
        return seconds <= _MAX_SLOT_DELAY_SECONDS

    @override
    def block_until(self, not_before: float) -> None:
        self._backoff_until = not_before
        self._share_limiter.block_until(not_before)

    def _next_slot_index(self, now: float, membership: Membership) -> int:
        """Return the number of this replica's first slot that has not passed."""
        interval_seconds = membership.slot_interval_seconds
        members = membership.members
        slots_per_turn = math.ceil(1000 / round(interval_seconds * 1000))
        redis_now = now + membership.clock_offset_seconds
        slot_index = math.floor((redis_now - _SLOT_JITTER_SECONDS) / interval_seconds) + 1
        own_turn = members.index(membership.replica)
        while True:
            turn = slot_index // slots_per_turn
            if turn % len(members) != own_turn:
                slot_index = (turn + 1) * slots_per_turn
            elif _is_guard_slot(slot_index, slots_per_turn):
                slot_index += 1
            else:
                return slot_index


def _is_guard_slot(slot_index: int, slots_per_turn: int) -> bool:
    """Return whether a slot is left free, as the last one of a turn.

    It separates a late call of one member from the first call of the next one. Slots that are far apart need
    none: the time between two of them is more than any lateness.
    """
    return slots_per_turn > _MIN_SLOTS_FOR_GUARD and slot_index % slots_per_turn == slots_per_turn - 1
