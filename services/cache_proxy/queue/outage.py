"""Consecutive failed calls to the model: when the next call is due, and when the model counts as down.

`lua/fail.lua` decides the same for all replicas, with the constants of this module as its arguments.
"""

import math

from services.cache_proxy.errors import ModelUnavailableError

MIN_BACKOFF_SECONDS = 0.25
MAX_BACKOFF_SECONDS = 5.0
BACKOFF_JITTER = (0.8, 1.2)

MAX_MODEL_FAULT_BACKOFF_SECONDS = 0.5
"""The longest backoff after a fault of the model itself: it is up, and the search for the pair goes on."""

MAX_MODEL_FAULTS = 10
"""Consecutive faults before the model counts as down: the search for one pair may take so many calls."""

PROBE_PAIRS = 10
"""The maximum of pairs in a call while calls fail."""

# A call may be claimed a little before it is due.
_SLACK_SECONDS = 0.02


class Outage:
    """Consecutive failed calls. All times are on the caller's clock.

    A failure long after the one before starts another outage, because no call was made in between.

    State:

    - `failures`: their number, 0 without an outage, and `error`, the last one.
    - `_started_at` and `failed_at`: when the first and the last of them were noticed.
    - `not_before`: no call before this time.
    - `is_model_fault`: the last failure was a fault of the model itself, which a pair may have caused.
    - `is_pushback`: the model gave the backoff of the last failure.
    - `is_down`: the failures have lasted for the retry window.
    """

    def __init__(self, *, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._started_at = -math.inf
        self.failed_at = -math.inf
        self.failures = 0
        self.not_before = -math.inf
        self.is_model_fault = False
        self.is_pushback = False
        self.is_down = False
        self.error: ModelUnavailableError | None = None

    @property
    def next_call_is_probe(self) -> bool:
        """Return whether the next call has only a few pairs.

        After a fault of the model it has not: the search for the pair needs whole batches. Nor after a
        pushback: the model is up, and has given the time at which it accepts a batch again.
        """
        return self.defers_to_others and not self.is_pushback

    @property
    def defers_to_others(self) -> bool:
        """Return whether the failure may be this replica's own, so that others should make the next calls.

        A fault of the model is not: the call reached it.
        """
        return self.failures > 0 and not self.is_model_fault

    def record_failure(
        self,
        error: ModelUnavailableError,
        *,
        sent_at: float,
        now: float,
        pushback_seconds: float | None,
        model_fault: bool,
        jitter: float = 1.0,
    ) -> None:
        """Record a failed call. Calls that were in a call together fail together, and count as one.

        `pushback_seconds` is the backoff that the model gave, if it gave one. `jitter` scales the others.
        """
        self.expire(now=now)
        if not self.failures:
            self._started_at = now
        if not self.failures or sent_at >= self.failed_at:
            self.failures += 1
            self.failed_at = now
        window_ends = self._started_at + self._window_seconds - _SLACK_SECONDS
        if pushback_seconds is None:
            longest = MAX_MODEL_FAULT_BACKOFF_SECONDS if model_fault else MAX_BACKOFF_SECONDS
            backoff_seconds = jitter * min(longest, MIN_BACKOFF_SECONDS * 2.0 ** min(self.failures - 1, 20))
            # The last try is when the retry window ends.
            if now < window_ends and not model_fault:
                backoff_seconds = min(backoff_seconds, window_ends + _SLACK_SECONDS - now)
        else:
            backoff_seconds = pushback_seconds
        self.not_before = max(self.not_before, now + backoff_seconds)
        self.is_model_fault = model_fault
        self.is_pushback = pushback_seconds is not None
        self.is_down = now >= window_ends and (not model_fault or self.failures >= MAX_MODEL_FAULTS)
        self.error = error

    def expire(self, *, now: float) -> None:
        """Reset the outage if its last failure is too long ago to show anything about the model."""
        longest = self._window_seconds + MAX_BACKOFF_SECONDS * BACKOFF_JITTER[1]
        if now > max(self.failed_at, self.not_before) + longest:
            self.reset()

    def reset(self) -> None:
        """Record that the model answered: calls continue at the full rate at once."""
        self.failures = 0
        self.not_before = -math.inf
        self.is_model_fault = False
        self.is_pushback = False
        self.is_down = False
        self.error = None
