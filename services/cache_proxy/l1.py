"""L1: the answers this process remembers, bounded in bytes."""

import sys

# Measured with tracemalloc: a 16-byte key object and its share of a dict that is two thirds full.
_ENTRY_BYTES = sys.getsizeof(b"x" * 16) + 111


class L1Cache:
    """Two generations of a dict from digest to entry (`store/dated.py`), instead of a list that orders them.

    A hit in the old one moves to the young; when the young one holds half of the bound, the old is dropped
    whole. So an entry lives on if it is asked for once a generation, at the price of one look-up more.

    `epoch` counts what was forgotten on purpose. A look-up elsewhere may outlast an invalidation and come
    back with what was invalidated: so a put carries the epoch read before it, and is dropped if that is over.

    State: `epoch`, `_young`, `_old`; touched only from the event loop, never across an await.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.epoch = 0
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}
        self._interned: dict[int, int] = {}
        self._half_entries = max_bytes // 2 // _ENTRY_BYTES

    def get(self, digest: bytes) -> int:
        """The entry, or 0."""
        entry = self._young.get(digest, 0)
        if not entry:
            entry = self._old.pop(digest, 0)
            if entry:
                self._add(digest, entry)
        return entry

    def put(self, digest: bytes, entry: int, *, epoch: int) -> None:
        """Remember an entry, unless something was invalidated since `epoch`."""
        if epoch == self.epoch:
            self._add(digest, entry)

    def remove(self, digest: bytes) -> None:
        """Forget what was invalidated."""
        self.epoch += 1
        self._young.pop(digest, None)
        self._old.pop(digest, None)

    def clear(self) -> None:
        """Forget everything."""
        self.epoch += 1
        self._young, self._old = {}, {}

    def _add(self, digest: bytes, entry: int) -> None:
        if not self._half_entries:
            return
        if len(self._young) >= self._half_entries:
            self._old, self._young = self._young, {}
            self._interned.clear()
        # One object for all entries of a level and day: they are few, and a number takes 28 bytes.
        self._young[digest] = self._interned.setdefault(entry, entry)

    @property
    def entries(self) -> int:
        """How many answers are remembered."""
        return len(self._young) + len(self._old)

    @property
    def size_bytes(self) -> int:
        """What they take."""
        return self.entries * _ENTRY_BYTES
