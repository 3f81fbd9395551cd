"""A mapping from bytes that is bounded in bytes, and that a scan does not empty."""

import sys
from collections.abc import Callable
from typing import Generic, TypeVar

from cachebox import LRUCache

_Value = TypeVar("_Value")

# Measured as resident memory: a node of 64 bytes, and 21 of the table right after it has doubled.
_ENTRY_BYTES = 85
_MIN_KEY_BYTES = 48
_ALLOCATION_UNIT_BYTES = 16  # what Python's allocator rounds up to
_MAX_PREALLOCATED_ENTRIES = 7 * 2**17  # fills a table of 2^20 places, 9 MiB


class SegmentedLru(Generic[_Value]):
    """Two LRUs of half the bound each: what is asked for again moves from `_trial` to `_proven`.

    So keys that are asked for once push out only each other. Values are shared between keys, and cost
    nothing. State: `_trial` and `_proven`, a key in one of them at most; touched only from the event loop.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._segment_bytes = max_bytes // 2
        # A table that grows stops the loop (54 ms at a million entries): so it is made at its full size.
        roomy = min(self._segment_bytes // (_ENTRY_BYTES + _MIN_KEY_BYTES), _MAX_PREALLOCATED_ENTRIES)
        self._probation = self._make_segment(roomy)
        self._protected = self._make_segment(roomy)
        self.get_protected: Callable[[bytes, None], _Value | None] = self._protected.get
        """The first half of `get`, for a loop that cannot spare a call into Python."""

    def get(self, key: bytes) -> _Value | None:
        """The value, if it is known."""
        value = self.get_protected(key, None)
        return self.promote(key) if value is None else value

    def promote(self, key: bytes) -> _Value | None:
        """The value of a key that `get_proven` does not have: from now on it does."""
        value = self._probation.pop(key, None)
        if value is not None:
            self._protected.insert(key, value)
        return value

    def put(self, key: bytes, value: _Value) -> None:
        """Remember a value, unless it alone is over the bound."""
        if _entry_bytes(key, value) > self._segment_bytes:
            return
        segment = self._protected if key in self._protected else self._probation
        segment.insert(key, value)

    def clear(self) -> None:
        """Forget everything."""
        self._probation.clear(reuse=True)
        self._protected.clear(reuse=True)

    def _make_segment(self, capacity: int) -> LRUCache[bytes, _Value]:
        return LRUCache(self._segment_bytes, capacity=capacity, getsizeof=_entry_bytes)

    @property
    def entries(self) -> int:
        """How many keys are remembered."""
        return len(self._probation) + len(self._protected)

    @property
    def size_bytes(self) -> int:
        """What they take."""
        return self._probation.current_size() + self._protected.current_size()


def _entry_bytes(key: bytes, _value: object) -> int:
    return (
        _ENTRY_BYTES
        + (sys.getsizeof(key) + _ALLOCATION_UNIT_BYTES - 1) // _ALLOCATION_UNIT_BYTES * _ALLOCATION_UNIT_BYTES
    )
