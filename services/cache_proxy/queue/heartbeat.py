"""The replies of the heartbeat scripts, and how missed messages are found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from services.cache_proxy.errors import StoreError

# Redis's clock is read in whole milliseconds.
_CLOCK_RESOLUTION_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """Reply of `heartbeat.lua`.

    - `now_ms`: Redis's clock.
    - `last_sequence`: the number of the last message that was published.
    - `queue_id`: a random id that the queue has got when it was made.
    - `waiting_pairs`: the number of waiting pairs of each priority, and `oldest_ms` the longest wait.
    - `members`: the replicas that share the slots if Redis is lost, in the order of their turns.
    - `silent_replicas`: id and HTTP address of each replica whose heartbeats have stopped.
    - `slot_interval_ms`: the time between two slots of `members`.
    - `subscriptions`: how many subscriptions of this replica the server knows.
    - `last_log_entries`: the last entry of each invalidation log, None if the log is empty.
    - `server_run_id`: an id of the server process.
    - `quota_held_pairs`: how many pairs wait only for their callers' quotas.
    - `unreadable_values`: names of limits in Redis that were not numbers.
    """

    now_ms: int
    last_sequence: int
    queue_id: bytes
    waiting_pairs: Sequence[int]
    oldest_ms: float
    members: tuple[str, ...]
    silent_replicas: Sequence[tuple[str, str]]
    slot_interval_ms: float
    subscriptions: int
    last_log_entries: Sequence[bytes | None]
    server_run_id: str
    quota_held_pairs: int
    unreadable_values: Sequence[str]

    @classmethod
    def decode(cls, reply: Any) -> "HeartbeatReply":
        """Return the unpacked reply as an object. Raises `StoreError` if it has another form."""
        try:
            (
                now_ms,
                last_sequence,
                queue_id,
                waiting_pairs,
                oldest_ms,
                members,
                silent_replicas,
                slot_interval_ms,
                subscriptions,
                last_log_entries,
                server_run_id,
                quota_held_pairs,
                unreadable_values,
            ) = reply
            return cls(
                now_ms=int(now_ms),
                last_sequence=int(last_sequence),
                queue_id=bytes(queue_id),
                waiting_pairs=[int(count) for count in waiting_pairs],
                oldest_ms=float(oldest_ms),
                members=_split_members(members),
                silent_replicas=[(_text(replica), _text(address)) for replica, address in silent_replicas],
                slot_interval_ms=float(slot_interval_ms),
                subscriptions=int(subscriptions),
                last_log_entries=_log_entries(last_log_entries),
                server_run_id=_text(server_run_id),
                quota_held_pairs=int(quota_held_pairs),
                unreadable_values=[_text(name) for name in unreadable_values],
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise _unreadable_reply() from error


@dataclass(frozen=True, slots=True)
class StandbyReply:
    """Reply of `standby.lua` while replicas of another queue format use the shared queue.

    The fields that `HeartbeatReply` has too mean the same. `last_heartbeat_age_ms` is the time since this
    replica's last heartbeat as a member.
    """

    other_format: int
    now_ms: int
    members: tuple[str, ...]
    slot_interval_ms: float
    last_heartbeat_age_ms: float
    last_log_entries: Sequence[bytes | None]

    @classmethod
    def decode(cls, reply: Any) -> "StandbyReply | None":
        """Return the unpacked reply as an object, None if the shared queue has this replica's format now.

        Raises `StoreError` if it has another form.
        """
        try:
            may_join, *rest = reply
            if may_join:
                return None
            other_format, now_ms, members, slot_interval_ms, last_heartbeat_age_ms, last_log_entries = rest
            return cls(
                other_format=int(other_format),
                now_ms=int(now_ms),
                members=_split_members(members),
                slot_interval_ms=float(slot_interval_ms),
                last_heartbeat_age_ms=float(last_heartbeat_age_ms),
                last_log_entries=_log_entries(last_log_entries),
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise _unreadable_reply() from error


class ClockOffset:
    """Redis's clock minus time.monotonic, as exactly as the replies of heartbeats show it.

    State, touched only from the event loop: `seconds`, None before the first reply.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None

    def update(self, redis_now: float, *, requested_at: float, received_at: float) -> float:
        """Narrow the offset by a reply, and return it.

        Redis read its clock between request and reply, which bounds the offset. A slow reply bounds it only
        loosely, so a known offset is kept where it lies within the bounds.
        """
        min_offset = redis_now - received_at
        max_offset = redis_now + _CLOCK_RESOLUTION_SECONDS - requested_at
        if self.seconds is None:
            self.seconds = (min_offset + max_offset) / 2
        else:
            self.seconds = min(max_offset, max(min_offset, self.seconds))
        return self.seconds


def _split_members(members: Any) -> tuple[str, ...]:
    return tuple(_text(members).split(","))


def _log_entries(entries: Any) -> list[bytes | None]:
    return [entry if isinstance(entry, bytes) else None for entry in entries]


def _text(value: Any) -> str:
    text: str = value.decode("ascii", "replace")
    return text


def _unreadable_reply() -> StoreError:
    return StoreError("the heartbeat's reply cannot be read")
