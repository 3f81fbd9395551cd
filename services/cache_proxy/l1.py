"""L1: the answers this process remembers, bounded in bytes."""

import sys

# Measured with tracemalloc: a 16-byte key object and its share of a dict that is two thirds full.
_ENTRY_BYTES = sys.getsizeof(b"x" * 16) + 111


class L1Cache:
    """Two generations of a dict, instead of a list that orders every entry.

    A hit in the old one moves to the young; when the young one holds half of the bound, the old is dropped
    whole. So an entry lives on if it is asked for once a generation, at the price of one look-up more.
    State: `_young`, `_old`; touched only from the event loop, never across an await.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._half_entries = max_bytes // 2 // _ENTRY_BYTES

    def get(self, digest: bytes) -> int:
        """The level, or 0."""
        level = self._young.get(digest, 0)
        if not level:
            level = self._old.pop(digest, 0)
            if level:
                self.put(digest, level)
        return level

    def put(self, digest: bytes, level: int) -> None:
        """Remember a level."""
        if not self._half_entries:
            return
        if len(self._young) >= self._half_entries:
            self._old, self._young = self._young, {}
        self._young[digest] = level

    @property
    def entries(self) -> int:
        """How many answers are remembered."""
        return len(self._young) + len(self._old)

    @property
    def size_bytes(self) -> int:
        """What they take."""
        return self.entries * _ENTRY_BYTES
