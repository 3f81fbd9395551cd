"""The words of the domain: pairs, their outcomes and the priorities of requests.

Seniority levels are in `services/common/levels.py`, since the augmenter knows them too.
"""

from dataclasses import dataclass

from services.cache_proxy.errors import PairError

DIGEST_BYTES = 16
"""The length of the keyed hash of a pair."""

NORMAL_FORM_VERSION = 1
"""The version of the normal forms of texts. It is part of every key: raise it when a normal form changes."""

DAY_SECONDS = 86_400

INTERACTIVE = "interactive"
BULK = "bulk"
REFRESH = "refresh"

PRIORITIES = (INTERACTIVE, BULK)
"""What a caller may request, the highest first."""

PRIORITY_CLASSES = (*PRIORITIES, REFRESH)
"""How the queue orders pairs, the highest first: no caller waits for a pair that is refreshed."""

PACE = 0.98
"""The share of the rate limit that is used.

A call is spent here and seen at the model, where two calls may arrive closer together than they were sent.
This keeps the model's own window below its limit for a jitter of up to 2 % of the interval.
"""

# Tags and lengths of the message and its fields take 10 bytes, the longest uuid 11; rounded up.
_PAIR_OVERHEAD_BYTES = 24


@dataclass(frozen=True, slots=True)
class Pair:
    """A pair to be inferred: its digest, and its texts as the caller spelled them."""

    digest: bytes
    company: str
    title: str

    @property
    def size_bytes(self) -> int:
        """Return the size of the pair in a call to the model, rounded up."""
        return len(self.company.encode()) + len(self.title.encode()) + _PAIR_OVERHEAD_BYTES


Outcome = int | PairError
"""How a pair ended: its level, or the reason why it has none."""
