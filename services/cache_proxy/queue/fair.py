"""One lane of waiting pairs, fair between callers: start-time fair queueing (Goyal, Vin, Cheng, 1996).

A caller's next pair starts where the caller's last one ends, and never before the lane's virtual time, which
is the start of what was last taken. So pairs go out in the order of their starts: a caller with two pairs
does not wait behind one with a hundred thousand.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from services.cache_proxy.queue import MAX_TRACES, Pair

_MAX_CALLERS = 1000  # names are the callers' to choose: those beyond share one turn
_OTHERS = ""


@dataclass(slots=True, eq=False)
class Entry:
    """A pair that has not ended: `attempts` and `refusals` count the failed calls it was in.

    `wanted` is false once nobody waits for it: in flight it may still be answered, but is not sent again.
    `start` is its place in the lane; `traces` those of who waits, a few.
    """

    pair: Pair
    priority: str
    caller: str
    enqueued_at: float
    wanted: bool = True
    attempts: int = 0
    refusals: int = 0
    start: float = 0.0
    traces: list[bytes] = field(default_factory=list)

    def traced(self, trace: bytes) -> None:
        """One more waits, in this trace, if in any."""
        if trace and len(self.traces) < MAX_TRACES and trace not in self.traces:
            self.traces.append(trace)


class FairLane:
    """State: `_arrivals`, all that wait, oldest first; `_turns`, the same by caller; `_ends`, by caller."""

    def __init__(self) -> None:
        self._arrivals: OrderedDict[bytes, Entry] = OrderedDict()
        self._turns: dict[str, OrderedDict[bytes, Entry]] = {}
        self._ends: dict[str, float] = {}
        self._virtual = 0.0

    def __len__(self) -> int:
        return len(self._arrivals)

    def __contains__(self, entry: Entry) -> bool:
        return self._arrivals.get(entry.pair.digest) is entry

    def __iter__(self) -> Iterator[Entry]:
        """All that wait, in the order in which they go out."""
        return heapq.merge(*(turn.values() for turn in self._turns.values()), key=attrgetter("start"))

    def start_of(self, caller: str) -> float:
        """Where the caller's next pair would start."""
        return max(self._virtual, self._ends.get(caller, 0.0))

    def until(self, start: float) -> int:
        """How many go out no later than one that starts there: a caller's pairs start one after the other."""
        return sum(
            min(len(turn), max(0, math.floor(start - next(iter(turn.values())).start) + 1))
            for turn in self._turns.values()
        )

    def oldest(self) -> Entry | None:
        """The one that came first."""
        return next(iter(self._arrivals.values()), None)

    def add(self, entry: Entry, *, front: bool = False) -> None:
        """Have an entry wait: behind its caller's last, or, as before, in front of what came since."""
        if entry.caller not in self._turns and len(self._turns) >= _MAX_CALLERS:
            entry.caller = _OTHERS
        if front:  # the lane may have been empty meanwhile, and begun to count anew
            entry.start = min(entry.start, self._virtual - 1)
        else:
            entry.start = self.start_of(entry.caller)
            self._ends[entry.caller] = entry.start + 1
        for waiting in (self._arrivals, self._turns.setdefault(entry.caller, OrderedDict())):
            waiting[entry.pair.digest] = entry
            waiting.move_to_end(entry.pair.digest, last=not front)

    def remove(self, entry: Entry) -> None:
        """Take an entry out that is there."""
        del self._arrivals[entry.pair.digest]
        turn = self._turns[entry.caller]
        del turn[entry.pair.digest]
        if not turn:
            del self._turns[entry.caller]
            if self._ends.get(entry.caller, 0.0) <= self._virtual or not self._arrivals:
                self._ends.pop(entry.caller, None)
        if not self._arrivals:  # whoever comes next starts anew
            self._ends.clear()
            self._virtual = 0.0

    def advance(self, entry: Entry) -> None:
        """An entry goes out: the lane's time is its start."""
        self._virtual = max(self._virtual, entry.start)
