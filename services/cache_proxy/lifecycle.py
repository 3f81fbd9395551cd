"""The process: the signals that end it, and the tasks that it is nothing without."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from services.common.tasks import cancel_and_wait

_log = logging.getLogger(__name__)


def stop_on_signals() -> asyncio.Event:
    """Set by SIGTERM or SIGINT; a second one ends the process at once."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)  # the embedded server, if there is one, ends with its parent
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


@asynccontextmanager
async def background_task(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Have this done meanwhile; the process ends with it if it fails."""
    task = asyncio.create_task(coroutine)
    task.add_done_callback(_terminate_on_failure)
    try:
        yield
    finally:
        await cancel_and_wait([task])


def _terminate_on_failure(task: "asyncio.Task[None]") -> None:
    """A proxy that calls no model, or forgets nothing, yet looks alive, is worse than a restarted one."""
    if not task.cancelled() and task.exception() is not None:
        _log.critical("a task that never ends has ended", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)
