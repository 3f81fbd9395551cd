"""The pairs that wait, by priority: what comes next, and what goes into a batch."""

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from services.cache_proxy.metrics import PRIORITIES
from services.cache_proxy.queue import Pair

_BULK_SHARE = 10  # a tenth of a batch, in pairs and in bytes, is kept for bulk


@dataclass(slots=True, eq=False)
class Entry:
    """A pair that has not ended: `attempts` and `refusals` count the failed calls it was in.

    `wanted` is false once nobody waits for it: in flight it may still be answered, but is not sent again.
    """

    pair: Pair
    priority: str
    enqueued_at: float
    wanted: bool = True
    attempts: int = 0
    refusals: int = 0


class Lanes:
    """First in, first out within a priority. State: `_lanes` and the bytes of all that is in them."""

    def __init__(self) -> None:
        self._lanes: dict[str, OrderedDict[bytes, Entry]] = {name: OrderedDict() for name in PRIORITIES}
        self.size_bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def count(self, priority: str) -> int:
        """How many wait in one lane."""
        return len(self._lanes[priority])

    def ahead_of(self, priority: str) -> int:
        """How many wait that a new pair of this priority would have to let pass."""
        return sum(self.count(name) for name in PRIORITIES[: PRIORITIES.index(priority) + 1])

    def entries(self) -> list[Entry]:
        """All that wait."""
        return [entry for lane in self._lanes.values() for entry in lane.values()]

    def oldest_at(self) -> float:
        """When the pair at the front of a lane came, the earlier; `inf` if nothing waits."""
        fronts = (next(iter(lane.values())) for lane in self._lanes.values() if lane)
        return min((entry.enqueued_at for entry in fronts), default=math.inf)

    def add(self, entry: Entry, *, front: bool = False) -> None:
        """Have an entry wait at the end of its lane, or at the front."""
        lane = self._lanes[entry.priority]
        lane[entry.pair.digest] = entry
        lane.move_to_end(entry.pair.digest, last=not front)
        self.size_bytes += entry.pair.size_bytes

    def discard(self, entry: Entry) -> bool:
        """Take an entry out. Whether it waited here."""
        lane = self._lanes[entry.priority]
        if lane.get(entry.pair.digest) is not entry:
            return False
        del lane[entry.pair.digest]
        self.size_bytes -= entry.pair.size_bytes
        return True

    def promote(self, entry: Entry, priority: str) -> None:
        """Give an entry the better of its priority and this one; it goes to the end of the better lane."""
        if PRIORITIES.index(priority) < PRIORITIES.index(entry.priority):
            waits = self.discard(entry)
            entry.priority = priority
            if waits:
                self.add(entry)

    def compose(self, *, batch_pairs: int, batch_bytes: int) -> list[Entry]:
        """The next batch, at least one pair of it; they still wait."""
        interactive, bulk = self._lanes["interactive"].values(), self._lanes["bulk"].values()
        kept_pairs = math.ceil(batch_pairs / _BULK_SHARE) if batch_pairs > 1 else 0
        kept = _fitting(bulk, pairs=kept_pairs, size_bytes=batch_bytes // _BULK_SHARE)
        left_bytes = batch_bytes - _size_bytes(kept)
        chosen = _fitting(interactive, pairs=batch_pairs - len(kept), size_bytes=left_bytes) + kept
        chosen += _fitting(
            itertools.islice(bulk, len(kept), None),
            pairs=batch_pairs - len(chosen),
            size_bytes=batch_bytes - _size_bytes(chosen),
        )
        return chosen or self.entries()[:1]  # a pair that is over the bound alone goes alone


def _fitting(entries: Iterable[Entry], *, pairs: int, size_bytes: int) -> list[Entry]:
    """The first of `entries`, up to the one that would pass a bound."""
    chosen = []
    for entry in itertools.islice(entries, pairs):
        size_bytes -= entry.pair.size_bytes
        if size_bytes < 0:
            break
        chosen.append(entry)
    return chosen


def _size_bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.pair.size_bytes for entry in entries)
