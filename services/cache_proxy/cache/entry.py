"""What the store knows of a pair: its level and the day it was inferred on, in one integer, an *entry*."""

import time
from dataclasses import dataclass

DAY_ZERO_SECONDS = 1_767_225_600  # 2026-01-01
DAY_SECONDS = 86_400
LEVEL_BITS = 3
_LEVEL_MASK = (1 << LEVEL_BITS) - 1
_DAY_MASK = (1 << 13) - 1
NO_EXPIRY = 2**31
"""The day that does not come."""
FROM_PREVIOUS_VERSION = 1 << 16  # the answer of the previous model version: served, and refreshed behind


def day_at(seconds: float) -> int:
    """Return the day of a time in seconds since 1970: days since `DAY_0`."""
    return int(seconds - DAY_ZERO_SECONDS) // DAY_SECONDS


def today() -> int:
    """Return the day by this process's own clock. Answers age by the store's: see `StoreClock`."""
    return day_at(time.time())


def pack_entry(level: int, day: int) -> int:
    """The entry of a level; 0 is the entry of a pair that is not known."""
    return day << LEVEL_BITS | level


def entry_level(entry: int) -> int:
    """Its level, 0 if there is none."""
    return entry & _LEVEL_MASK


def entry_day(entry: int) -> int:
    """The day it was inferred on."""
    return entry >> LEVEL_BITS & _DAY_MASK


@dataclass(frozen=True, slots=True)
class FreshnessPolicy:
    """How old an answer may be; `ttl_days` 0: any age."""

    ttl_days: int = 0
    serve_stale: bool = False

    def is_fresh(self, entry: int, *, day: int) -> bool:
        """Whether it answers as it is: neither too old on `day`, nor another version's."""
        return entry != 0 and self._is_within_ttl(entry, day) and not entry & FROM_PREVIOUS_VERSION

    def servable(self, entry: int, *, day: int) -> int:
        """The entry itself if it may be answered, else 0. One that is not fresh is also to be asked again.

        The previous version's answers age as this version's do.
        """
        return entry if self.serve_stale or self._is_within_ttl(entry, day) else 0

    def _is_within_ttl(self, entry: int, day: int) -> bool:
        return not self.ttl_days or entry_day(entry) > day - self.ttl_days

    def expiry_day(self, entry: int) -> int:
        """The first day on which it is no longer fresh."""
        return entry_day(entry) + self.ttl_days if self.ttl_days else NO_EXPIRY

    @property
    def retention_days(self) -> int:
        """When the store drops it; 0: never. What is served stale gets its time once more to be asked for."""
        return self.ttl_days * (2 if self.serve_stale else 1)
