"""One attempt at a time, for everyone who waits for its outcome."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from services.common.tasks import end

_Value = TypeVar("_Value")


class SharedAttempt(Generic[_Value]):
    """Callers share the attempt that is running; its failure stands for `hold_seconds` more.

    Retries on top of retries then cost what one costs. A caller that is cancelled does not end the attempt.

    State: `_running`, the attempt, and `_failure` with the time until which it stands; event loop only.
    """

    def __init__(self, attempt: Callable[[], Awaitable[_Value]], *, hold_seconds: float) -> None:
        self._attempt = attempt
        self._hold_seconds = hold_seconds
        self._running: asyncio.Task[_Value] | None = None
        self._failure: Exception | None = None
        self._failure_stands_until = 0.0

    async def outcome(self) -> _Value:
        """Return what the attempt returns. Raises what it raises."""
        if self._failure is not None and time.monotonic() < self._failure_stands_until:
            raise self._failure.with_traceback(None)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(self._running)

    async def close(self) -> None:
        """End the attempt that is running."""
        if self._running is not None:
            await end([self._running])

    async def _run(self) -> _Value:
        try:
            value = await self._attempt()
        except Exception as error:
            self._failure = error
            self._failure_stands_until = time.monotonic() + self._hold_seconds
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
