"""Retries the RPCs of a file within its budget, and logs when the target fails and recovers."""

import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina

from services.augmenter.client.rpc import CallFailedError
from services.augmenter.errors import RpcFailedError
from services.common.grpc_details import format_status

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_INITIAL_WAIT_SECONDS = 0.1
_MAX_WAIT_SECONDS = 10.0


class OutageLogger:
    """Logs once when the target fails, and once when it has recovered, over all files.

    State: `_failing_calls` (RPCs that failed and have not yet ended), `_outage_logged`.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._failing_calls = 0
        self._outage_logged = False

    def on_failure(self, error: CallFailedError) -> None:
        """Record the first failure of an RPC that is retried."""
        if not self._outage_logged:
            _log.warning("%s answered %s; retrying", self.target, format_status(error.code, error.details))
        self._failing_calls += 1
        self._outage_logged = True

    def on_end(self, *, recovered: bool) -> None:
        """Record the end of that RPC, by success or by giving up."""
        self._failing_calls -= 1
        if recovered and self._failing_calls == 0:
            _log.warning("%s answers again", self.target)
            self._outage_logged = False


class RetryBudget:
    """The time for retries of one file. It is spent while at least one of the file's RPCs is failing.

    State: `_failing_calls` (RPCs that failed and have not yet ended), `_failing_since` (when the first of
    them failed), `_earlier_seconds` (spent on earlier outages).
    """

    def __init__(self, *, seconds: float, outage_logger: OutageLogger) -> None:
        self._seconds = seconds
        self._outage_logger = outage_logger
        self._failing_calls = 0
        self._failing_since = 0.0
        self._earlier_seconds = 0.0

    async def call(self, rpc: Callable[[], Awaitable[_T]]) -> _T:
        """Call `rpc` until it succeeds. Raises RpcFailedError. Errors but CallFailedError are passed on."""
        failures = 0
        recovered = False

        def wait_or_stop(error: Exception) -> float | bool:
            nonlocal failures
            if not isinstance(error, CallFailedError) or not error.retryable:
                return False
            # From its first failure on, the RPC spends the budget of its file.
            failures += 1
            if failures == 1:
                self._on_failure(error)
            remaining = self._seconds - self._get_spent_seconds()
            if remaining <= 0:
                return False
            # The server set the delay of the retry, so there is no backoff of our own.
            if error.pushback_seconds is not None:
                return error.pushback_seconds if error.pushback_seconds <= remaining else False
            # Exponential backoff with jitter.
            max_wait = min(_MAX_WAIT_SECONDS, _INITIAL_WAIT_SECONDS * 2.0 ** min(failures, 10))
            return min(remaining, max_wait * random.uniform(0.5, 1))  # noqa: S311 - jitter needs no secrecy

        try:
            async for attempt in stamina.retry_context(on=wait_or_stop, attempts=None, timeout=None):
                with attempt:
                    result = await rpc()
                    recovered = True
                    return result
        except CallFailedError as error:
            raise RpcFailedError(
                target=self._outage_logger.target,
                code=error.code,
                details=error.details,
                tried_seconds=self._get_spent_seconds() if failures else None,
            ) from error
        finally:
            if failures:
                self._on_end(recovered=recovered)
        raise AssertionError("stamina ends by a result or by an error")

    def _get_spent_seconds(self) -> float:
        return self._earlier_seconds + (
            time.monotonic() - self._failing_since if self._failing_calls else 0.0
        )

    def _on_failure(self, error: CallFailedError) -> None:
        if self._failing_calls == 0:
            self._failing_since = time.monotonic()
        self._failing_calls += 1
        self._outage_logger.on_failure(error)

    def _on_end(self, *, recovered: bool) -> None:
        if self._failing_calls == 1:
            self._earlier_seconds = self._get_spent_seconds()
        self._failing_calls -= 1
        self._outage_logger.on_end(recovered=recovered)
