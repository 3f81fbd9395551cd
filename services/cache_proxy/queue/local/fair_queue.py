"""A queue that is fair between callers: start-time fair queueing (Goyal, Vin, Cheng, 1996).

Each pair has a start tag: the finish tag of the caller's previous pair, but no less than the virtual time of
the queue, which is the start tag of the pair that was last taken. Pairs are taken in the order of their start
tags. So a caller with two pairs does not wait behind one with a hundred thousand.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from services.cache_proxy.domain import Pair
from services.cache_proxy.queue.interface import MAX_TRACES_PER_PAIR, Claim

# Callers choose their names themselves. Those beyond this number share one flow.
MAX_CALLERS = 100
_SHARED_FLOW = ""


@dataclass(slots=True, eq=False)
class QueuedPair:
    """A pair that has not ended.

    - `is_awaited`: False once no request waits for it. The call that it is in may still answer it, but it is
      not sent again.
    - `attempts` and `rejections`: the failed and the rejected calls that it was in.
    - `positions`: where it waits, or waited before it was sent. The first is that of the first request.
    - `request_id`: the request that queued it.
    - `charged_claim`: the claim for which an account's quota was charged.
    - `trace_contexts`: the traces of a few of the requests that wait for it.
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
        """Add the trace of one more request that waits, unless it is empty, known or one too many."""
        if (
            trace_context
            and len(self.trace_contexts) < MAX_TRACES_PER_PAIR
            and trace_context not in self.trace_contexts
        ):
            self.trace_contexts.append(trace_context)


@dataclass(slots=True, eq=False)
class QueuePosition:
    """Where an entry waits: by priority, caller and quota account (None: no quota applies).

    `start_tag` is its place in that queue.
    """

    entry: QueuedPair
    priority: str
    caller: str
    account: str | None = None
    start_tag: float = 0.0
    trace_contexts: list[bytes] = field(default_factory=list)

    def add_trace(self, trace_context: bytes) -> None:
        """Add the trace of one more request that waits, unless it is empty, known or one too many."""
        if (
            trace_context
            and len(self.trace_contexts) < MAX_TRACES_PER_PAIR
            and trace_context not in self.trace_contexts
        ):
            self.trace_contexts.append(trace_context)


class FairQueue:
    """One fair queue.

    State: `_by_arrival`, all positions, oldest first; `_by_caller`, the same for each caller; `_finish_tags`,
    of each caller's last position; `virtual_time`. An empty queue resets its tags if it is `standalone`, that
    is, if no other queue is ordered by the same tags.
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
        """Iterate over all positions in the order in which they are taken."""
        return heapq.merge(*(flow.values() for flow in self._by_caller.values()), key=attrgetter("start_tag"))

    def start_tag(self, caller: str) -> float:
        """Return the start tag that the caller's next pair would get."""
        return max(self.virtual_time, self._finish_tags.get(caller, 0.0))

    def count_through(self, start_tag: float) -> int:
        """Return how many positions have a start tag up to the given one.

        The tags of a caller's positions are consecutive, so the first one is enough to count them.
        """
        return sum(
            min(len(flow), max(0, math.floor(start_tag - next(iter(flow.values())).start_tag) + 1))
            for flow in self._by_caller.values()
        )

    def oldest(self) -> QueuedPair | None:
        """Return the entry that was added first."""
        return next((position.entry for position in self._by_arrival.values()), None)

    def add(self, position: QueuePosition, *, at_front: bool = False) -> None:
        """Add a position behind the caller's last one, or in front of all."""
        if position.caller not in self._by_caller and len(self._by_caller) >= MAX_CALLERS:
            position.caller = _SHARED_FLOW
        if at_front:
            # The queue may have been empty and reset meanwhile, so the old tag may be too high.
            position.start_tag = min(position.start_tag, self.virtual_time - 1)
        else:
            position.start_tag = self.start_tag(position.caller)
            self._finish_tags[position.caller] = position.start_tag + 1
        for positions in (self._by_arrival, self._by_caller.setdefault(position.caller, OrderedDict())):
            positions[position.entry.pair.digest] = position
            positions.move_to_end(position.entry.pair.digest, last=not at_front)

    def remove(self, position: QueuePosition) -> None:
        """Remove a position that is in the queue."""
        del self._by_arrival[position.entry.pair.digest]
        flow = self._by_caller[position.caller]
        del flow[position.entry.pair.digest]
        if not flow:
            del self._by_caller[position.caller]
            if self._finish_tags.get(position.caller, 0.0) <= self.virtual_time:
                self._finish_tags.pop(position.caller, None)
        if not self._by_arrival and self._standalone:
            self.reset()

    def reset(self) -> None:
        """Reset all tags of an empty queue."""
        self._finish_tags.clear()
        self.virtual_time = 0.0

    def advance(self, start_tag: float) -> None:
        """Set the virtual time to the start tag of a position that is taken."""
        self.virtual_time = max(self.virtual_time, start_tag)
