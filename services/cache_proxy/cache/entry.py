"""Entries of the store: the level of a pair and the day it was inferred on, packed in one integer."""

import time
from dataclasses import dataclass

from services.cache_proxy.domain import DAY_SECONDS

# 2026-01-01 00:00 UTC in seconds since 1970.
DAY_ZERO_SECONDS = 1_767_225_600
LEVEL_BITS = 3
_LEVEL_MASK = (1 << LEVEL_BITS) - 1
_DAY_MASK = (1 << 13) - 1
NO_EXPIRY = 2**31
"""A day of expiry later than any day that an entry can hold."""
FROM_PREVIOUS_VERSION = 1 << 16
"""The bit that marks an answer of the previous model version, which is served and then refreshed."""


def day_at(seconds: float) -> int:
    """Return the day of a time in seconds since 1970, counted from `DAY_ZERO_SECONDS`."""
    return int(seconds - DAY_ZERO_SECONDS) // DAY_SECONDS


def today() -> int:
    """Return the current day by the clock of this process.

    The age of answers is measured by the clock of the store instead: see `StoreClock`.
    """
    return day_at(time.time())


def pack_entry(level: int, day: int) -> int:
    """Return the entry of a level and a day; the entry 0 stands for an unknown pair."""
    return day << LEVEL_BITS | level


def entry_level(entry: int) -> int:
    """Return the level of an entry, 0 if it has none."""
    return entry & _LEVEL_MASK


def entry_day(entry: int) -> int:
    """Return the day on which an entry was inferred."""
    return entry >> LEVEL_BITS & _DAY_MASK


@dataclass(frozen=True, slots=True)
class FreshnessPolicy:
    """Decide by its age whether an answer is fresh, stale or expired; `ttl_days` 0 means no limit."""

    ttl_days: int = 0
    serve_stale: bool = False

    def is_fresh(self, entry: int, *, day: int) -> bool:
        """Return whether an entry can be served on `day` without a refresh.

        It must be within its time to live and come from the current model version.
        """
        return entry != 0 and self._is_within_ttl(entry, day) and not entry & FROM_PREVIOUS_VERSION

    def servable(self, entry: int, *, day: int) -> int:
        """Return the entry if it may be served on `day`, fresh or stale, else 0.

        A stale entry must be refreshed after it was served. Answers of the previous model version age as
        those of the current one do.
        """
        return entry if self.serve_stale or self._is_within_ttl(entry, day) else 0

    def _is_within_ttl(self, entry: int, day: int) -> bool:
        return not self.ttl_days or entry_day(entry) > day - self.ttl_days

    def expiry_day(self, entry: int) -> int:
        """Return the first day on which an entry is no longer fresh."""
        return entry_day(entry) + self.ttl_days if self.ttl_days else NO_EXPIRY

    @property
    def retention_days(self) -> int:
        """After how many days the store deletes an entry; 0: never.

        Where stale answers are served, it is twice the time to live, so that there is time to request one.
        """
        return self.ttl_days * (2 if self.serve_stale else 1)
