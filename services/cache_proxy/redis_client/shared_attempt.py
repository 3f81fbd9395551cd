"""One running attempt, shared by all callers that need its result."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from services.common.tasks import cancel_and_wait

_Value = TypeVar("_Value")


class SharedAttempt(Generic[_Value]):
    """Share the running attempt between callers, and its failure for `failure_ttl_seconds` longer.

    Retries on several levels then cost no more than one retry. Cancelling a caller does not cancel the
    attempt.

    State: `_task`, the running attempt; `_failure`, the last error, and `_failure_expires_at`, until when it
    is raised again without a new attempt. Used from the event loop only.
    """

    def __init__(self, attempt: Callable[[], Awaitable[_Value]], *, failure_ttl_seconds: float) -> None:
        self._attempt = attempt
        self._failure_ttl_seconds = failure_ttl_seconds
        self._task: asyncio.Task[_Value] | None = None
        self._failure: Exception | None = None
        self._failure_expires_at = 0.0

    async def result(self) -> _Value:
        """Return the result of the running attempt, or start one. Raises the error of the attempt."""
        if self._failure is not None and time.monotonic() < self._failure_expires_at:
            raise self._failure.with_traceback(None)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await asyncio.shield(self._task)

    async def close(self) -> None:
        """Cancel the running attempt."""
        if self._task is not None:
            await cancel_and_wait([self._task])

    async def _run(self) -> _Value:
        try:
            value = await self._attempt()
        except Exception as error:
            self._failure = error
            self._failure_expires_at = time.monotonic() + self._failure_ttl_seconds
            raise
        self._failure = None
        return value


async def first_success(tasks: set["asyncio.Task[_Value]"]) -> _Value:
    """Return the first result of several tasks. Raises the last error if all of them fail."""
    pending = tasks
    while True:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        failure = None
        for task in done:
            failure = task.exception()
            if failure is None:
                return task.result()
        if not pending:
            # For the type checker: every task in `done` has failed.
            assert failure is not None  # noqa: S101
            raise failure
