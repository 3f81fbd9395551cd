"""The pairs that wait, by priority: what comes next, and what goes into a batch."""

import itertools
import math
from collections.abc import Iterable

from services.cache_proxy.metrics import LANES
from services.cache_proxy.queue.fair import Entry, FairLane

_BULK_SHARE = 10  # a tenth of a batch, in pairs and in bytes, is kept for bulk


def is_better(priority: str, other: str) -> bool:
    """Whether it goes before the other."""
    return LANES.index(priority) < LANES.index(other)


def calls_until(priority: str, *, ahead: int, interactive: int, bulk: int, batch_pairs: int) -> int:
    """In how many calls the `ahead` first of a lane go out: bulk has its tenth of each, and what is left."""
    tenth = _tenth(batch_pairs)
    if priority == "interactive":
        return math.ceil(ahead / (batch_pairs - (tenth if bulk else 0)))
    if priority == "bulk":
        behind = math.ceil((interactive + ahead) / batch_pairs)
        return min(behind, math.ceil(ahead / tenth)) if tenth else behind
    return math.ceil((interactive + bulk + ahead) / batch_pairs)


class Lanes:
    """Fair between callers within a priority. State: `_lanes` and the bytes of all that is in them."""

    def __init__(self) -> None:
        self._lanes = {name: FairLane() for name in LANES}
        self.size_bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def count(self, priority: str) -> int:
        """How many wait in one lane."""
        return len(self._lanes[priority])

    def calls_until_new(self, *, priority: str, caller: str, count: int, batch_pairs: int) -> int:
        """In how many calls at the latest so many new pairs of a caller's would all go out."""
        lane = self._lanes[priority]
        last = lane.start_of(caller) + count - 1
        return self._calls_until(priority, lane.until(last) + count, batch_pairs)

    def calls_until(self, entry: Entry, *, batch_pairs: int) -> int:
        """In how many calls at the latest one that waits goes out."""
        return self._calls_until(entry.priority, self._lanes[entry.priority].until(entry.start), batch_pairs)

    def _calls_until(self, priority: str, ahead: int, batch_pairs: int) -> int:
        return calls_until(
            priority, ahead=ahead, interactive=self.count("interactive"), bulk=self.count("bulk"),
            batch_pairs=batch_pairs,
        )  # fmt: skip

    def entries(self) -> list[Entry]:
        """All that wait."""
        return [entry for lane in self._lanes.values() for entry in lane]

    def oldest_at(self, priorities: Iterable[str] = LANES) -> float:
        """When the pair at the front of one of these lanes came, the earliest; `inf` if nothing waits."""
        oldest = (self._lanes[priority].oldest() for priority in priorities)
        return min((entry.enqueued_at for entry in oldest if entry is not None), default=math.inf)

    def waits(self, entry: Entry) -> bool:
        """Whether it is here, not in flight or suspect."""
        return entry in self._lanes[entry.priority]

    def add(self, entry: Entry, *, front: bool = False) -> None:
        """Have an entry wait at the end of its caller's turn, or at the front."""
        self._lanes[entry.priority].add(entry, front=front)
        self.size_bytes += entry.pair.size_bytes

    def discard(self, entry: Entry) -> bool:
        """Take an entry out. Whether it waited here."""
        if entry not in self._lanes[entry.priority]:
            return False
        self._lanes[entry.priority].remove(entry)
        self.size_bytes -= entry.pair.size_bytes
        return True

    def promote(self, entry: Entry, priority: str, caller: str) -> None:
        """Give an entry the better of its priority and this one; it joins the turn of who asked for that."""
        if is_better(priority, entry.priority):
            waits = self.discard(entry)
            entry.priority, entry.caller = priority, caller
            if waits:
                self.add(entry)

    def take(self, *, batch_pairs: int, batch_bytes: int) -> list[Entry]:
        """The next batch, at least one pair of it; they wait no more."""
        chosen = self._compose(batch_pairs=batch_pairs, batch_bytes=batch_bytes)
        for entry in chosen:
            self._lanes[entry.priority].advance(entry)
        for entry in chosen:
            self.discard(entry)
        return chosen

    def _compose(self, *, batch_pairs: int, batch_bytes: int) -> list[Entry]:
        interactive, bulk, refresh = (self._lanes[name] for name in LANES)
        kept = _fitting(bulk, pairs=_tenth(batch_pairs), size_bytes=batch_bytes // _BULK_SHARE)
        left_bytes = batch_bytes - _size_bytes(kept)
        chosen = _fitting(interactive, pairs=batch_pairs - len(kept), size_bytes=left_bytes) + kept
        for more in (itertools.islice(bulk, len(kept), None), refresh):
            chosen += _fitting(
                more, pairs=batch_pairs - len(chosen), size_bytes=batch_bytes - _size_bytes(chosen)
            )
        return chosen or self.entries()[:1]  # a pair that is over the bound alone goes alone


def _tenth(batch_pairs: int) -> int:
    return math.ceil(batch_pairs / _BULK_SHARE) if batch_pairs > 1 else 0


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
