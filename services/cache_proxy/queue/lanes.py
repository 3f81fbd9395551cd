"""The pairs that wait, by priority: what comes next, and what goes into a batch."""

import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass

from services.cache_proxy.metrics import PRIORITIES
from services.cache_proxy.queue import Pair

_BULK_SHARE = 10  # a tenth of a batch is kept for bulk


@dataclass(slots=True, eq=False)
class Entry:
    """A pair that has not ended: `attempts` and `refusals` count the failed calls it was in."""

    pair: Pair
    priority: str
    enqueued_at: float
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
        interactive, bulk = self._lanes["interactive"], self._lanes["bulk"]
        kept = math.ceil(batch_pairs / _BULK_SHARE) if batch_pairs > 1 or not interactive else 0
        for_bulk = min(len(bulk), max(kept, batch_pairs - len(interactive)))
        chosen: list[Entry] = []
        size_bytes = 0
        for entry in itertools.chain(
            itertools.islice(interactive.values(), batch_pairs - for_bulk),
            itertools.islice(bulk.values(), for_bulk),
        ):
            size_bytes += entry.pair.size_bytes
            if chosen and size_bytes > batch_bytes:
                break
            chosen.append(entry)
        return chosen
