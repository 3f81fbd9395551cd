"""L1, the answer cache in the memory of this process, keyed by the bytes of a pair on the wire."""

from services.cache_proxy.cache.entry import NO_EXPIRY
from services.cache_proxy.cache.slru import SegmentedLru
from services.cache_proxy.wire.batches import level_suffix
from services.common.levels import LEVEL_COUNT

_BUCKETS = 32
# Measured: a bytearray, its buffer and its place in a list.
_CELL_BYTES = 96


class L1Cache:
    """Map the canonical bytes of a pair (see `wire/batches.py`) to a *cell*: the bytes that encode its level.

    A cell is shared by all entries of the same level, bucket of digests and day of expiry. To drop a digest,
    or everything that expires on a day, its cells are emptied: every entry that refers to them becomes a
    miss. That costs a look-up nothing and needs no index from digests to the spellings of their pairs. So
    `remove` drops a 32nd of the entries along with the one, and the shared cache returns those again. An
    index that drops a single pair would take 107 bytes an entry.

    `epoch` counts invalidations. A look-up elsewhere may begin before an invalidation, end after it and
    return the invalidated answer. So a put carries the epoch that was read before its look-up, and is dropped
    if the epoch has changed since.

    State: `epoch`, `_today`, `_lru`, `_cells_by_day`. Used from the event loop only, never across an await.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self.epoch = 0
        self.enabled = max_bytes > 0
        self._today = 0
        self._lru: SegmentedLru[bytearray] = SegmentedLru(max_bytes=max_bytes)
        self._cells_by_day: dict[int, list[bytearray]] = {}
        self.get_protected = self._lru.get_protected
        self.promote = self._lru.promote

    def put(self, key: bytes, level: int, *, digest: bytes, epoch: int, expiry_day: int = NO_EXPIRY) -> None:
        """Store a level until `expiry_day` begins, unless a pair was invalidated since `epoch`."""
        if epoch != self.epoch or expiry_day <= self._today:
            return
        cells = self._cells_by_day.get(expiry_day)
        if cells is None:
            cells = [bytearray() for _ in range(_BUCKETS * LEVEL_COUNT)]
            self._cells_by_day[expiry_day] = cells
        index = digest[0] % _BUCKETS * LEVEL_COUNT + level - 1
        # An emptied cell is replaced and never filled again: dropped entries still refer to it.
        if not cells[index]:
            cells[index] = bytearray(level_suffix(level))
        self._lru.put(key, cells[index])

    def remove(self, digest: bytes) -> None:
        """Drop the answer for a digest, in all spellings of its pair."""
        self.epoch += 1
        first = digest[0] % _BUCKETS * LEVEL_COUNT
        for cells in self._cells_by_day.values():
            for cell in cells[first : first + LEVEL_COUNT]:
                cell.clear()

    def expire(self, today: int) -> None:
        """Drop the answers whose day of expiry is today or earlier.

        If the day goes backwards, the clock was wrong until now and so is every day of expiry: then all
        answers that expire are dropped.
        """
        if today == self._today:
            return
        is_backwards = today < self._today
        self._today = today
        for day in [day for day in self._cells_by_day if day <= today or (is_backwards and day != NO_EXPIRY)]:
            for cell in self._cells_by_day.pop(day):
                cell.clear()

    def clear(self) -> None:
        """Drop all answers."""
        self.epoch += 1
        self._lru.clear()
        self._cells_by_day.clear()

    @property
    def entries(self) -> int:
        """The number of entries, including dropped ones until others evict them."""
        return self._lru.entries

    @property
    def size_bytes(self) -> int:
        """The memory that entries and cells take."""
        return self._lru.size_bytes + len(self._cells_by_day) * _BUCKETS * LEVEL_COUNT * _CELL_BYTES
