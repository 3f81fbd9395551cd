"""Failed calls to the model in a row: when the next one is due, and when the model counts as down.

`lua/fail.lua` decides the same for all replicas. The figures stand here.
"""

import math

from services.cache_proxy.errors import ModelUnavailableError

MIN_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.25, 5.0
MAX_MODEL_FAULT_BACKOFF_SECONDS = 0.5  # the model is there, and one pair may be the cause: it is looked for
BACKOFF_JITTER = (0.8, 1.2)
PROBE_PAIRS = 10  # in a call while calls fail
_SLACK_SECONDS = 0.02  # a call may be claimed a little before it is due
MAX_MODEL_FAULTS = 10  # in a row before the model counts as down: the search for one pair may take so many


class Outage:
    """State: `failures` in a row, `not_before` which there is no call, `is_down`, the last `error`.

    And `_since`, when the first of the failures was noticed, and `failed_at`, when the last one was. A
    failure long after the one before begins another outage, for nothing was tried in between.
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
        """Whether the next call is a small one.

        After a breakdown it is not: whole batches are judged. After a pushback neither: the model is there,
        and said when it takes a batch again.
        """
        return self.defers_to_others and not self.is_pushback

    @property
    def defers_to_others(self) -> bool:
        """Whether the failure may be of the own way to the model, so that others' calls go first.

        A breakdown is not: the model is reached.
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
        """Note a failed call. Those that were under way together fail together, as one."""
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
            if now < window_ends and not model_fault:  # the last try is when the window ends
                backoff_seconds = min(backoff_seconds, window_ends + _SLACK_SECONDS - now)
        else:
            backoff_seconds = pushback_seconds
        self.not_before = max(self.not_before, now + backoff_seconds)
        self.is_model_fault = model_fault
        self.is_pushback = pushback_seconds is not None
        self.is_down = now >= window_ends and (not model_fault or self.failures >= MAX_MODEL_FAULTS)
        self.error = error

    def expire(self, *, now: float) -> None:
        """Forget failures so long ago that they say nothing any more."""
        longest = self._window_seconds + MAX_BACKOFF_SECONDS * BACKOFF_JITTER[1]
        if now > max(self.failed_at, self.not_before) + longest:
            self.reset()

    def reset(self) -> None:
        """The model answered: calls go on at the full rate at once."""
        self.failures = 0
        self.not_before = -math.inf
        self.is_model_fault = self.is_pushback = False
        self.is_down = False
        self.error = None
