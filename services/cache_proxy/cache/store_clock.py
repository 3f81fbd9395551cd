"""The clock that decides the age of answers: the one of the server that stores them."""

import time

from services.cache_proxy.cache.entry import day_at


class StoreClock:
    """Follow the clock of the server that stores the answers; each look-up returns the server's time.

    So replicas whose own clocks differ agree on the age of an answer.

    State: `_offset_seconds`, the server's time minus `time.monotonic()`. It is None until the first reply,
    and stays None where answers are stored in this process: then the clock of the process counts. Used from
    the event loop only.
    """

    def __init__(self) -> None:
        self._offset_seconds: float | None = None

    def synchronize(self, server_seconds: float, *, sent_at: float, received_at: float) -> None:
        """Adopt the time in a server's reply; `sent_at` and `received_at` are from `time.monotonic()`.

        The server is assumed to have read its clock halfway between the two.
        """
        self._offset_seconds = server_seconds - (sent_at + received_at) / 2

    def now(self) -> float:
        """Return the server's time in seconds since 1970."""
        return time.time() if self._offset_seconds is None else time.monotonic() + self._offset_seconds

    def today(self) -> int:
        """Return the server's current day, counted as in `entry.py`."""
        return day_at(self.now())

    def difference_seconds(self) -> float:
        """Return how far the clock of this process is ahead of the server's; negative if it is behind."""
        return time.time() - self.now()
