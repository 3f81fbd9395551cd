"""The clock by which answers age: that of the server which keeps them, whatever the proxy's own says."""

import time

from services.cache_proxy.cache.entry import day_at


class StoreClock:
    """Follows the clock of the server that keeps the answers, whose time comes with each look-up.

    State: `_offset_seconds`, that clock less time.monotonic; None until a server has replied, and for good
    where answers are kept in this process: then the process's own clock counts. Event loop only.
    """

    def __init__(self) -> None:
        self._offset_seconds: float | None = None

    def synchronize(self, server_seconds: float, *, sent_at: float, received_at: float) -> None:
        """Follow a reply in which the server gave its time; both moments are on time.monotonic."""
        self._offset_seconds = server_seconds - (sent_at + received_at) / 2

    def now(self) -> float:
        """Return the server's time in seconds since 1970."""
        return time.time() if self._offset_seconds is None else time.monotonic() + self._offset_seconds

    def today(self) -> int:
        """Return the server's day, counted as `dated.py` does."""
        return day_at(self.now())

    def difference_seconds(self) -> float:
        """Return by how much this process's clock is ahead; negative if it is behind."""
        return time.time() - self.now()
