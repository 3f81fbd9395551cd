"""The queues of one priority: one of pairs without a quota, and one for each account, in turn."""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.cache_proxy.queue.local.fair_queue import FairQueue, QueuedPair, QueuePosition


@dataclass(slots=True)
class _Flow:
    """The positions of one queue that may be taken now.

    `remaining` is how many pairs the quota allows, not counting pairs that were charged before. `start_tag`
    is the place of `head` among all flows of the priority.
    """

    positions: Iterator[QueuePosition]
    account: str | None
    remaining: float
    start_tag: float = 0.0
    head: QueuePosition | None = None


class PriorityClass:
    """All positions of one priority.

    State:

    - `default_queue`: positions without a quota.
    - `account_queues`: positions by account, for accounts that have any.
    - `_finish_tags`: by account, the finish tag of the position that was last taken.

    Within an account, positions have tags of the account's own queue. Among all queues of the priority they
    get tags only when they are taken: pairs that a quota held back have no precedence afterwards.
    """

    def __init__(self, priority: str) -> None:
        self.priority = priority
        self.default_queue = FairQueue(standalone=False)
        self.account_queues: dict[str, FairQueue] = {}
        self._finish_tags: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.default_queue) + sum(map(len, self.account_queues.values()))

    def count(self, account: str) -> int:
        """Return how many positions of an account wait here."""
        queue = self.account_queues.get(account)
        return 0 if queue is None else len(queue)

    def queue_for(self, account: str | None) -> FairQueue:
        """Return the queue of an account, an empty one if it has no positions, the default queue for None."""
        if account is None:
            return self.default_queue
        return self.account_queues.get(account) or FairQueue()

    def __contains__(self, position: QueuePosition) -> bool:
        return position in self.queue_for(position.account)

    def add(self, position: QueuePosition, *, at_front: bool = False) -> None:
        """Add a position to its queue."""
        queue = self.queue_for(position.account)
        queue.add(position, at_front=at_front)
        if position.account is not None:
            self.account_queues[position.account] = queue

    def remove(self, position: QueuePosition) -> None:
        """Remove a position that is in its queue."""
        queue = self.queue_for(position.account)
        queue.remove(position)
        if not len(queue) and position.account is not None:
            del self.account_queues[position.account]
        if not len(self):
            self.default_queue.reset()
            self._finish_tags.clear()

    def start_tag(self, account: str) -> float:
        """Return the start tag of an account's next pair among all queues."""
        return max(self.default_queue.virtual_time, self._finish_tags.get(account, 0.0))

    def advance(self, position: QueuePosition, start_tag: float) -> None:
        """Record that a position is taken with the given start tag among all queues."""
        self.default_queue.advance(start_tag)
        if position.account is not None:
            self.queue_for(position.account).advance(position.start_tag)
            self._finish_tags[position.account] = start_tag + 1

    def oldest_eligible(self, quotas_left: Mapping[str, float]) -> Iterator[QueuedPair]:
        """Yield the oldest entry of each queue that may send."""
        for account, queue in self.account_queues.items():
            first = queue.oldest()
            if first is not None and (quotas_left[account] or first.charged_claim is not None):
                yield first
        first = self.default_queue.oldest()
        if first is not None:
            yield first


class CandidateHeap:
    """Iterates over the positions of a priority that may be taken now, in their order.

    The queues must not change while it is used.
    """

    def __init__(self, priority_class: PriorityClass, quotas_left: Mapping[str, float]) -> None:
        self._class = priority_class
        self._heap: list[tuple[float, int, _Flow]] = []
        flows = [_Flow(iter(priority_class.default_queue), None, math.inf)]
        for account, queue in priority_class.account_queues.items():
            flows.append(_Flow(iter(queue), account, quotas_left[account], priority_class.start_tag(account)))
        for order, flow in enumerate(flows):
            self._push(flow, order)

    def peek(self) -> QueuePosition | None:
        """Return the next position, None if there is none."""
        return self._heap[0][2].head if self._heap else None

    def skip(self) -> None:
        """Pass over the next position."""
        _, order, flow = heapq.heappop(self._heap)
        self._push(flow, order)

    def pop(self) -> float:
        """Take the next position. Return its start tag among all queues."""
        tag, order, flow = heapq.heappop(self._heap)
        flow.start_tag += 1
        if flow.head is not None and flow.head.entry.charged_claim is None:
            flow.remaining -= 1
        self._push(flow, order)
        return tag

    def _push(self, flow: _Flow, order: int) -> None:
        """Move a flow to its next position, and keep it in the heap if that may be taken."""
        flow.head = next(flow.positions, None)
        if flow.head is None or (flow.remaining < 1 and flow.head.entry.charged_claim is None):
            return
        if flow.account is None:
            flow.start_tag = flow.head.start_tag
        heapq.heappush(self._heap, (flow.start_tag, order, flow))
