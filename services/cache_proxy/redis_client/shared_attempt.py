"""One attempt at a time, for everyone who waits for its outcome."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from services.common.tasks import cancel_and_wait

_Value = TypeVar("_Value")


class SharedAttempt(Generic[_Value]):
    """Callers share the attempt that is running; its failure stands for `hold_seconds` more.

    Retries on top of retries then cost what one costs. A caller that is cancelled does not end the attempt.

    State: `_running`, the attempt, and `_failure` with the time until which it stands; event loop only.
    """

    def __init__(self, attempt: Callable[[], Awaitable[_Value]], *, failure_ttl_seconds: float) -> None:
        self._attempt = attempt
        self._failure_ttl_seconds = failure_ttl_seconds
        self._task: asyncio.Task[_Value] | None = None
        self._failure: Exception | None = None
        self._failure_expires_at = 0.0

    async def result(self) -> _Value:
        """Return what the attempt returns. Raises what it raises."""
        if self._failure is not None and time.monotonic() < self._failure_expires_at:
            raise self._failure.with_traceback(None)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await asyncio.shield(self._task)

    async def close(self) -> None:
        """End the attempt that is running."""
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
    """Return the first result of several tasks. Raises the last one's error where all fail."""
    left = tasks
    while True:
        done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        failed = None
        for task in done:
            failed = task.exception()
            if failed is None:
                return task.result()
        if not left:
            assert failed is not None  # noqa: S101 - for the type checker: none succeeded
            raise failed
