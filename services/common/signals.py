"""SIGTERM: first no new work begins, and after a grace period the work in progress is cancelled."""

import asyncio
import signal


class ShutdownSignal:
    """Handles SIGTERM for the task that creates it, which is cancelled after the grace period.

    State: `stopping`, set by the first SIGTERM. A second one ends the process at once.
    """

    def __init__(self, *, grace_seconds: float) -> None:
        self.stopping = asyncio.Event()
        self._grace_seconds = grace_seconds
        self._loop = asyncio.get_running_loop()
        self._main_task = asyncio.current_task()
        self._loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)

    def _on_sigterm(self) -> None:
        self._loop.remove_signal_handler(signal.SIGTERM)
        self.stopping.set()
        self._loop.call_later(self._grace_seconds, self._cancel_task)

    def _cancel_task(self) -> None:
        if self._main_task and not self._main_task.done():
            self._main_task.cancel()
