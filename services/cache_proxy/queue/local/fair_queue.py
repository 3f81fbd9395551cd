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

from services.cache_proxy.domain import Pair
from services.cache_proxy.queue.interface import MAX_TRACES_PER_PAIR, Claim

MAX_CALLERS = 100  # names are the callers' to choose: those beyond share one turn
_SHARED_FLOW = ""


@dataclass(slots=True, eq=False)
class QueuedPair:
    """A pair that has not ended: `attempts` and `refusals` count the failed calls it was in.

    `wanted` is false once nobody waits for it: in flight it may still be answered, but is not sent again.
    `places` are where it waits, or waited before it was sent; the first is that of who asked first. `paid_by`
    is the claim that an account's quota was spent for; `traces` of a few who wait. `request` queued it.
    """

    pair: Pair
    caller: str
    enqueued_at: float
    is_awaited: bool = True
    attempts: int = 0
    rejections: int = 0
    positions: "list[QueuePosition]" = field(default_factory=list)
    request_id: str = ""
    charged_claim: Claim | None = None
    trace_contexts: list[bytes] = field(default_factory=list)

    def add_trace(self, trace_context: bytes) -> None:
        """One more waits, in this trace, if in any."""
        if (
            trace_context
            and len(self.trace_contexts) < MAX_TRACES_PER_PAIR
            and trace_context not in self.trace_contexts
        ):
            self.trace_contexts.append(trace_context)


@dataclass(slots=True, eq=False)
class QueuePosition:
    """Where an entry waits: in whose turn, in a priority's own lane or an account's.

    `start` is its place there.
    """

    entry: QueuedPair
    priority: str
    caller: str
    account: str | None = None
    start_tag: float = 0.0
    trace_contexts: list[bytes] = field(default_factory=list)

    def add_trace(self, trace_context: bytes) -> None:
        """One more waits, in this trace, if in any."""
        if (
            trace_context
            and len(self.trace_contexts) < MAX_TRACES_PER_PAIR
            and trace_context not in self.trace_contexts
        ):
            self.trace_contexts.append(trace_context)


class FairQueue:
    """State: `_arrivals`, all that wait, oldest first; `_turns`, the same by caller; `_ends`, by caller.

    A lane that is empty begins to count anew, unless others count with it (`alone`).
    """

    def __init__(self, *, standalone: bool = True) -> None:
        self._standalone = standalone
        self._by_arrival: OrderedDict[bytes, QueuePosition] = OrderedDict()
        self._by_caller: dict[str, OrderedDict[bytes, QueuePosition]] = {}
        self._finish_tags: dict[str, float] = {}
        self.virtual_time = 0.0

    def __len__(self) -> int:
        return len(self._by_arrival)

    def __contains__(self, position: QueuePosition) -> bool:
        return self._by_arrival.get(position.entry.pair.digest) is position

    def __iter__(self) -> Iterator[QueuePosition]:
        """All that wait, in the order in which they go out."""
        return heapq.merge(*(turn.values() for turn in self._by_caller.values()), key=attrgetter("start_tag"))

    def start_tag(self, caller: str) -> float:
        """Where the caller's next pair would start."""
        return max(self.virtual_time, self._finish_tags.get(caller, 0.0))

    def count_through(self, start_tag: float) -> int:
        """How many go out no later than one that starts there: a caller's pairs start one after the other."""
        return sum(
            min(len(turn), max(0, math.floor(start_tag - next(iter(turn.values())).start_tag) + 1))
            for turn in self._by_caller.values()
        )

    def oldest(self) -> QueuedPair | None:
        """The one that came first."""
        return next((place.entry for place in self._by_arrival.values()), None)

    def add(self, position: QueuePosition, *, at_front: bool = False) -> None:
        """Have it wait: behind its caller's last, or, as before, in front of what came since."""
        if position.caller not in self._by_caller and len(self._by_caller) >= MAX_CALLERS:
            position.caller = _SHARED_FLOW
        if at_front:  # the lane may have been empty meanwhile, and begun to count anew
            position.start_tag = min(position.start_tag, self.virtual_time - 1)
        else:
            position.start_tag = self.start_tag(position.caller)
            self._finish_tags[position.caller] = position.start_tag + 1
        for waiting in (self._by_arrival, self._by_caller.setdefault(position.caller, OrderedDict())):
            waiting[position.entry.pair.digest] = position
            waiting.move_to_end(position.entry.pair.digest, last=not at_front)

    def remove(self, position: QueuePosition) -> None:
        """Take one out that is there."""
        del self._by_arrival[position.entry.pair.digest]
        turn = self._by_caller[position.caller]
        del turn[position.entry.pair.digest]
        if not turn:
            del self._by_caller[position.caller]
            if self._finish_tags.get(position.caller, 0.0) <= self.virtual_time:
                self._finish_tags.pop(position.caller, None)
        if not self._by_arrival and self._standalone:
            self.reset()

    def reset(self) -> None:
        """Nobody waits: whoever comes next starts with the others."""
        self._finish_tags.clear()
        self.virtual_time = 0.0

    def advance(self, start_tag: float) -> None:
        """What starts there goes out: that is the lane's time."""
        self.virtual_time = max(self.virtual_time, start_tag)
