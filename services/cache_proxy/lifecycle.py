"""The life of the process: signals that stop it, and background tasks whose failure stops it."""

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
    """Return an event that SIGTERM or SIGINT sets. A second signal ends the process at once."""
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            # The embedded Redis server, if there is one, gets a signal from the kernel when its parent dies.
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


@asynccontextmanager
async def background_task(coroutine: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine during the block. If it fails, the process stops."""
    task = asyncio.create_task(coroutine)
    task.add_done_callback(_terminate_on_failure)
    try:
        yield
    finally:
        await cancel_and_wait([task])


def _terminate_on_failure(task: "asyncio.Task[None]") -> None:
    """Stop the process if the task failed.

    A proxy that no longer calls the model, or applies no invalidations, and yet looks healthy, is worse than
    one that is restarted.
    """
    if not task.cancelled() and task.exception() is not None:
        _log.critical("a task that never ends has ended", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)
