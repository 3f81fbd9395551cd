"""Signal that a claim may be worth trying, now or after a delay."""

import asyncio


class ChangeSignal:
    """An event for one waiter, with at most one delayed notification under way.

    State, touched only from the event loop: `_event`, set from a notification until `wait` returns; `_timer`,
    the delayed notification.
    """

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def notify(self) -> None:
        """Let `wait` return."""
        self._event.set()

    def notify_after(self, delay_seconds: float) -> None:
        """Let `wait` return after a delay. Of several delayed notifications only the earliest is kept."""
        loop = asyncio.get_running_loop()
        due = loop.time() + delay_seconds
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = loop.call_at(due, self._on_timer)

    def clear(self) -> None:
        """Forget the notifications until now."""
        self._event.clear()

    async def wait(self) -> None:
        """Return once there was a notification since the last return."""
        await self._event.wait()
        self._event.clear()

    def _on_timer(self) -> None:
        self._timer = None
        self._event.set()
