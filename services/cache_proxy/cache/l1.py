"""L1: the answers this process remembers, by the very bytes in which pairs are asked and answered."""

from services.cache_proxy.cache.entry import NO_EXPIRY
from services.cache_proxy.cache.slru import SegmentedLru
from services.cache_proxy.wire.batches import level_suffix
from services.common.levels import LEVEL_COUNT

_BUCKETS = 32
_CELL_BYTES = 96  # measured: a bytearray, its buffer and its place in a list


class L1Cache:
    """Keys are canonical bytes of a pair (see `wire.py`), values are *cells*: the bytes that say the level.

    A cell is shared by all entries of the same level, bucket of digests and day of expiry. To forget a
    digest, or what is too old, cells are emptied: whoever still refers to one finds nothing, at no cost to a
    look-up and without an index from digests to their spellings. `remove` so forgets a 32nd of the entries,
    which L2 gives back; an index that forgets one alone would take 107 bytes an entry.

    `epoch` counts what was forgotten on purpose. A look-up elsewhere may outlast an invalidation and come
    back with what was invalidated: so a put carries the epoch read before its look-up, and is dropped if
    that is over.

    State: `epoch`, `_today`, `_answers`, `_cells`; touched only from the event loop, never across an await.
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
        """Remember a level until `expires_day` begins, unless something was invalidated since `epoch`."""
        if epoch != self.epoch or expiry_day <= self._today:
            return
        cells = self._cells_by_day.get(expiry_day)
        if cells is None:
            cells = self._cells_by_day[expiry_day] = [bytearray() for _ in range(_BUCKETS * LEVEL_COUNT)]
        place = digest[0] % _BUCKETS * LEVEL_COUNT + level - 1
        if not cells[place]:  # emptied cells stay so: entries that were forgotten refer to them
            cells[place] = bytearray(level_suffix(level))
        self._lru.put(key, cells[place])

    def remove(self, digest: bytes) -> None:
        """Forget the answer for a digest, in all its spellings."""
        self.epoch += 1
        first = digest[0] % _BUCKETS * LEVEL_COUNT
        for cells in self._cells_by_day.values():
            for cell in cells[first : first + LEVEL_COUNT]:
                cell.clear()

    def expire(self, today: int) -> None:
        """Forget what was to be remembered until today, or an earlier day.

        If the day goes back, the clock was wrong until now, and so is every day of expiry.
        """
        if today == self._today:
            return
        is_back = today < self._today
        self._today = today
        for day in [day for day in self._cells_by_day if day <= today or (is_back and day != NO_EXPIRY)]:
            for cell in self._cells_by_day.pop(day):
                cell.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.epoch += 1
        self._lru.clear()
        self._cells_by_day.clear()

    @property
    def entries(self) -> int:
        """How many answers are remembered (forgotten ones too, until others take their room)."""
        return self._lru.entries

    @property
    def size_bytes(self) -> int:
        """What they take."""
        return self._lru.size_bytes + len(self._cells_by_day) * _BUCKETS * LEVEL_COUNT * _CELL_BYTES
