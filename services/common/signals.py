"""SIGTERM: first no new files, then, when the grace is over, what is in work is abandoned."""

import asyncio
import signal


class Signals:
    """Made by the task that does all; it is cancelled in the end.

    State: `stopping`, set by the first SIGTERM. A second one ends the process at once.
    """

    def __init__(self, *, grace_seconds: float) -> None:
        self.stopping = asyncio.Event()
        self._grace_seconds = grace_seconds
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._loop.add_signal_handler(signal.SIGTERM, self._terminate)

    def _terminate(self) -> None:
        self._loop.remove_signal_handler(signal.SIGTERM)
        self.stopping.set()
        self._loop.call_later(self._grace_seconds, self._abandon)

    def _abandon(self) -> None:
        if self._task and not self._task.done():
            self._task.cancel()
