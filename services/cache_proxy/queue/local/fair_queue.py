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

from services.cache_proxy.queue.interface import MAX_TRACES, Claim, Pair

MAX_CALLERS = 100  # names are the callers' to choose: those beyond share one turn
_OTHERS = ""


@dataclass(slots=True, eq=False)
class Entry:
    """A pair that has not ended: `attempts` and `refusals` count the failed calls it was in.

    `wanted` is false once nobody waits for it: in flight it may still be answered, but is not sent again.
    `places` are where it waits, or waited before it was sent; the first is that of who asked first. `paid_by`
    is the claim that an account's quota was spent for; `traces` of a few who wait. `request` queued it.
    """

    pair: Pair
    caller: str
    enqueued_at: float
    wanted: bool = True
    attempts: int = 0
    refusals: int = 0
    places: "list[Place]" = field(default_factory=list)
    request: str = ""
    paid_by: Claim | None = None
    traces: list[bytes] = field(default_factory=list)

    def traced(self, trace: bytes) -> None:
        """One more waits, in this trace, if in any."""
        if trace and len(self.traces) < MAX_TRACES and trace not in self.traces:
            self.traces.append(trace)


@dataclass(slots=True, eq=False)
class Place:
    """Where an entry waits: in whose turn, in a priority's own lane or an account's.

    `start` is its place there.
    """

    entry: Entry
    priority: str
    caller: str
    account: str | None = None
    start: float = 0.0
    traces: list[bytes] = field(default_factory=list)

    def traced(self, trace: bytes) -> None:
        """One more waits, in this trace, if in any."""
        if trace and len(self.traces) < MAX_TRACES and trace not in self.traces:
            self.traces.append(trace)


class FairLane:
    """State: `_arrivals`, all that wait, oldest first; `_turns`, the same by caller; `_ends`, by caller.

    A lane that is empty begins to count anew, unless others count with it (`alone`).
    """

    def __init__(self, *, alone: bool = True) -> None:
        self._alone = alone
        self._arrivals: OrderedDict[bytes, Place] = OrderedDict()
        self._turns: dict[str, OrderedDict[bytes, Place]] = {}
        self._ends: dict[str, float] = {}
        self.virtual = 0.0

    def __len__(self) -> int:
        return len(self._arrivals)

    def __contains__(self, place: Place) -> bool:
        return self._arrivals.get(place.entry.pair.digest) is place

    def __iter__(self) -> Iterator[Place]:
        """All that wait, in the order in which they go out."""
        return heapq.merge(*(turn.values() for turn in self._turns.values()), key=attrgetter("start"))

    def start_of(self, caller: str) -> float:
        """Where the caller's next pair would start."""
        return max(self.virtual, self._ends.get(caller, 0.0))

    def until(self, start: float) -> int:
        """How many go out no later than one that starts there: a caller's pairs start one after the other."""
        return sum(
            min(len(turn), max(0, math.floor(start - next(iter(turn.values())).start) + 1))
            for turn in self._turns.values()
        )

    def oldest(self) -> Entry | None:
        """The one that came first."""
        return next((place.entry for place in self._arrivals.values()), None)

    def add(self, place: Place, *, front: bool = False) -> None:
        """Have it wait: behind its caller's last, or, as before, in front of what came since."""
        if place.caller not in self._turns and len(self._turns) >= MAX_CALLERS:
            place.caller = _OTHERS
        if front:  # the lane may have been empty meanwhile, and begun to count anew
            place.start = min(place.start, self.virtual - 1)
        else:
            place.start = self.start_of(place.caller)
            self._ends[place.caller] = place.start + 1
        for waiting in (self._arrivals, self._turns.setdefault(place.caller, OrderedDict())):
            waiting[place.entry.pair.digest] = place
            waiting.move_to_end(place.entry.pair.digest, last=not front)

    def remove(self, place: Place) -> None:
        """Take one out that is there."""
        del self._arrivals[place.entry.pair.digest]
        turn = self._turns[place.caller]
        del turn[place.entry.pair.digest]
        if not turn:
            del self._turns[place.caller]
            if self._ends.get(place.caller, 0.0) <= self.virtual:
                self._ends.pop(place.caller, None)
        if not self._arrivals and self._alone:
            self.begin_anew()

    def begin_anew(self) -> None:
        """Nobody waits: whoever comes next starts with the others."""
        self._ends.clear()
        self.virtual = 0.0

    def advance(self, start: float) -> None:
        """What starts there goes out: that is the lane's time."""
        self.virtual = max(self.virtual, start)
