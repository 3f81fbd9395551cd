"""SIGTERM: first no new files, then, when the grace is over, what is in work is abandoned."""

import asyncio
import signal


class ShutdownSignal:
    """Made by the task that does all; it is cancelled in the end.

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
