"""How many calls to the model go out before a pair does, given the share of each priority in a batch."""

import math

BULK_SHARE_DIVISOR = 10
"""A tenth of a batch, in pairs and in bytes, is reserved for bulk."""


def bulk_reserve(batch_pairs: int) -> int:
    """Return how many pairs of a batch are reserved for bulk."""
    return math.ceil(batch_pairs / BULK_SHARE_DIVISOR) if batch_pairs > 1 else 0


def calls_until(priority: str, *, ahead: int, interactive: int, bulk: int, batch_pairs: int) -> int:
    """Return in how many calls the first `ahead` pairs of a priority go out.

    `interactive` and `bulk` are the waiting pairs of these priorities. Bulk has its reserve in each
    batch, and what interactive pairs leave.
    """
    reserve = bulk_reserve(batch_pairs)
    if priority == "interactive":
        return math.ceil(ahead / (batch_pairs - (reserve if bulk else 0)))
    if priority == "bulk":
        after_interactive = math.ceil((interactive + ahead) / batch_pairs)
        return min(after_interactive, math.ceil(ahead / reserve)) if reserve else after_interactive
    return math.ceil((interactive + bulk + ahead) / batch_pairs)
