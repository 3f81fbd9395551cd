"""A segmented LRU cache: bounded in bytes, and not emptied by a scan of many keys.

The algorithm is Segmented LRU (Karedla, Love, Wherry 1994) with a probationary and a protected segment.
"""

import sys
from collections.abc import Callable
from typing import Generic, TypeVar

from cachebox import LRUCache

_Value = TypeVar("_Value")

# Measured as resident memory: a node of 64 bytes, and 21 bytes of the table right after it has doubled.
_ENTRY_BYTES = 85
_MIN_KEY_BYTES = 48
# Python's allocator rounds sizes up to a multiple of this.
_ALLOCATION_UNIT_BYTES = 16
# Fills a hash table of 2^20 slots, 9 MiB.
_MAX_PREALLOCATED_ENTRIES = 7 * 2**17


class SegmentedLru(Generic[_Value]):
    """Two LRUs of half the bound each: a key that is requested again moves to the protected one.

    So keys that are requested only once evict only each other. Values are shared between keys, and their
    size is not counted.

    State: `_probation` and `_protected`; a key is in one of them at most. Used from the event loop only.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._segment_bytes = max_bytes // 2
        # A table that grows blocks the event loop (54 ms at a million entries), so it is allocated at its
        # full size.
        capacity = min(
            self._segment_bytes // (_ENTRY_BYTES + _MIN_KEY_BYTES),
            _MAX_PREALLOCATED_ENTRIES,
        )
        self._probation = self._make_segment(capacity)
        self._protected = self._make_segment(capacity)
        self.get_protected: Callable[[bytes, None], _Value | None] = self._protected.get
        """The first half of `get`, for a loop that is too hot for a call into Python."""

    def get(self, key: bytes) -> _Value | None:
        """Return the value of a key, or None if it is unknown."""
        value = self.get_protected(key, None)
        return self.promote(key) if value is None else value

    def promote(self, key: bytes) -> _Value | None:
        """Move a key that `get_protected` does not find to the protected segment, and return its value."""
        value = self._probation.pop(key, None)
        if value is not None:
            self._protected.insert(key, value)
        return value

    def put(self, key: bytes, value: _Value) -> None:
        """Store a value, unless its entry alone exceeds the bound."""
        if _entry_bytes(key, value) > self._segment_bytes:
            return
        segment = self._protected if key in self._protected else self._probation
        segment.insert(key, value)

    def clear(self) -> None:
        """Remove all entries and keep the memory of the tables."""
        self._probation.clear(reuse=True)
        self._protected.clear(reuse=True)

    def _make_segment(self, capacity: int) -> LRUCache[bytes, _Value]:
        return LRUCache(self._segment_bytes, capacity=capacity, getsizeof=_entry_bytes)

    @property
    def entries(self) -> int:
        """The number of keys stored."""
        return len(self._probation) + len(self._protected)

    @property
    def size_bytes(self) -> int:
        """The memory that the entries take."""
        return self._probation.current_size() + self._protected.current_size()


def _entry_bytes(key: bytes, _value: object) -> int:
    units = (sys.getsizeof(key) + _ALLOCATION_UNIT_BYTES - 1) // _ALLOCATION_UNIT_BYTES
    return _ENTRY_BYTES + units * _ALLOCATION_UNIT_BYTES
