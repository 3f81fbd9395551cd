"""State of the queue for the status page: waiting pairs, expected waits, failures, replicas, reports.

Values in Redis may have been changed by anyone with access to it. A value that is out of range becomes None,
which the page shows as unknown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from services.cache_proxy.domain import BULK, INTERACTIVE, PACE, PRIORITY_CLASSES
from services.cache_proxy.errors import StoreError
from services.cache_proxy.queue.expected_calls import calls_until
from services.cache_proxy.queue.serialization import unpack

MAX_REPORTS = 256
"""How many replicas' reports of one minute are kept."""

MAX_REPORT_BYTES = 4096
_MAX_COUNT = 2**40

# A duration of 34 years.
_MAX_MILLISECONDS = 2**40
_MAX_RATE = 1e9
_MAX_BATCH_PAIRS = 1000

Report = tuple[int, bytes]
"""A minute of Unix time on Redis's clock, and what a replica counted in it (see `status/sampler.py`)."""


class ReportSource(Protocol):
    """Source of what a replica reports to the others with its heartbeats."""

    def pending_reports(self) -> Sequence[Report]:
        """Return the reports that are new or have changed: few, and of `MAX_REPORT_BYTES` at most."""

    def mark_reported(self, reports: Sequence[Report], *, clock_offset_seconds: float) -> None:
        """Record that Redis has these reports. `clock_offset_seconds`: its clock minus time.monotonic."""

    def resend_all(self) -> None:
        """Return all reports again from now on: Redis has lost them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueSnapshot:
    """State of the queue at one time. A figure that is not known is None, and a rate of 0 means no limit.

    - `waiting`: the number of waiting pairs of each priority.
    - `next_call_seconds`: the time until the next call that the limit allows.
    - `batch_interval_seconds`: the time between two full batches.
    - `reports`: those of all replicas; None for a queue that is not shared.
    - `is_down`: the model has answered nothing for the retry window.
    """

    now_seconds: float
    waiting: Mapping[str, int | None]
    next_call_seconds: float | None
    batch_pairs: int | None
    batch_interval_seconds: float | None
    pairs_per_second: float | None
    calls_per_second: float | None
    failures_in_a_row: int | None
    live_replicas: int | None
    silent_replicas: int | None
    reports: Sequence[Report] | None = None
    is_down: bool = False

    def wait_seconds(self, priority: str) -> float | None:
        """Return the expected wait of a new pair behind all pairs of its priority, None if it is unknown."""
        ahead = self.waiting[priority]
        interactive = self.waiting[INTERACTIVE]
        bulk = self.waiting[BULK]
        batch_pairs = self.batch_pairs
        if (
            ahead is None
            or interactive is None
            or bulk is None
            or batch_pairs is None
            or self.batch_interval_seconds is None
            or self.next_call_seconds is None
        ):
            return None
        calls = calls_until(
            priority, ahead=ahead + 1, interactive=interactive, bulk=bulk, batch_pairs=batch_pairs
        )
        return self.next_call_seconds + (calls - 1) * self.batch_interval_seconds


def decode_snapshot(reply: Any) -> QueueSnapshot:
    """Return the reply of `snapshot.lua` as an object. Raises `StoreError` if it has another form."""
    try:
        (
            now_ms,
            waiting,
            next_call_ms,
            batch_pairs,
            batch_ms,
            pairs_rate,
            calls_rate,
            failures,
            live,
            silent,
            reports,
            is_down,
        ) = unpack(reply)
        pairs_per_second, calls_per_second = (
            _read_number(rate, max_value=_MAX_RATE) for rate in (pairs_rate, calls_rate)
        )
        return QueueSnapshot(
            now_seconds=float(now_ms) / 1000,
            waiting={lane: _read_count(count) for lane, count in zip(PRIORITY_CLASSES, waiting, strict=True)},
            next_call_seconds=_read_seconds(next_call_ms),
            batch_pairs=_read_count(batch_pairs, min_value=1, max_value=_MAX_BATCH_PAIRS),
            batch_interval_seconds=_read_seconds(batch_ms),
            pairs_per_second=None if pairs_per_second is None else pairs_per_second / PACE,
            calls_per_second=None if calls_per_second is None else calls_per_second / PACE,
            failures_in_a_row=_read_count(failures),
            is_down=is_down == 1,
            live_replicas=_read_count(live),
            silent_replicas=_read_count(silent),
            reports=[
                (int(minute), packed)
                for minute, of_replicas in reports
                for packed in of_replicas
                if isinstance(packed, bytes)
            ],
        )
    except (ValueError, TypeError) as error:
        message = "the overview of the queue cannot be read"
        raise StoreError(message) from error


def _read_number(value: Any, *, max_value: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and 0 <= value <= max_value else None


def _read_count(value: Any, *, min_value: int = 0, max_value: int = _MAX_COUNT) -> int | None:
    found = _read_number(value, max_value=max_value)
    return int(found) if found is not None and found >= min_value and found == int(found) else None


def _read_seconds(milliseconds: Any) -> float | None:
    found = _read_number(milliseconds, max_value=_MAX_MILLISECONDS)
    return None if found is None else found / 1000
