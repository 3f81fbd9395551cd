"""The lanes of one priority: its own, fair between callers, and those of the accounts, in turn with them."""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.cache_proxy.queue.local.fair_queue import FairQueue, QueuedPair, QueuePosition


@dataclass(slots=True)
class _Flow:
    """What one lane may send: `left` pairs that are not paid for yet. `tag` is its head's place among all."""

    positions: Iterator[QueuePosition]
    account: str | None
    remaining: float
    start_tag: float = 0.0
    head: QueuePosition | None = None


class PriorityClass:
    """State: `own`; `accounts`, lanes of those with pairs here; `_ends`, where an account's last one ends.

    An account's pairs have their places in its own lane, and line up with the others only as they go out:
    what a quota held back has not stood in front meanwhile.
    """

    def __init__(self, priority: str) -> None:
        self.priority = priority
        self.default_queue = FairQueue(standalone=False)
        self.account_queues: dict[str, FairQueue] = {}
        self._finish_tags: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.default_queue) + sum(map(len, self.account_queues.values()))

    def count(self, account: str) -> int:
        """How many of the account's wait here."""
        lane = self.account_queues.get(account)
        return 0 if lane is None else len(lane)

    def queue_for(self, account: str | None) -> FairQueue:
        """Where the account's pairs wait, or would; of none, those of whoever has no account."""
        if account is None:
            return self.default_queue
        return self.account_queues.get(account) or FairQueue()

    def __contains__(self, position: QueuePosition) -> bool:
        return position in self.queue_for(position.account)

    def add(self, position: QueuePosition, *, at_front: bool = False) -> None:
        """Have it wait."""
        lane = self.queue_for(position.account)
        lane.add(position, at_front=at_front)
        if position.account is not None:
            self.account_queues[position.account] = lane

    def remove(self, position: QueuePosition) -> None:
        """Take one out that is there."""
        lane = self.queue_for(position.account)
        lane.remove(position)
        if not len(lane) and position.account is not None:
            del self.account_queues[position.account]
        if not len(self):
            self.default_queue.reset()
            self._finish_tags.clear()

    def start_tag(self, account: str) -> float:
        """Where the account's next pair starts among all."""
        return max(self.default_queue.virtual_time, self._finish_tags.get(account, 0.0))

    def advance(self, position: QueuePosition, start_tag: float) -> None:
        """It goes out, as the one that starts there among all."""
        self.default_queue.advance(start_tag)
        if position.account is not None:
            self.queue_for(position.account).advance(position.start_tag)
            self._finish_tags[position.account] = start_tag + 1

    def oldest_eligible(self, quotas_left: Mapping[str, float]) -> Iterator[QueuedPair]:
        """Who came first in each lane that may send."""
        for account, lane in self.account_queues.items():
            first = lane.oldest()
            if first is not None and (quotas_left[account] or first.charged_claim is not None):
                yield first
        first = self.default_queue.oldest()
        if first is not None:
            yield first


class CandidateHeap:
    """What may go out of a priority's lanes now, in its order. They must not change meanwhile."""

    def __init__(self, priority_class: PriorityClass, quotas_left: Mapping[str, float]) -> None:
        self._class = priority_class
        self._heap: list[tuple[float, int, _Flow]] = []
        streams = [_Flow(iter(priority_class.default_queue), None, math.inf)]
        for account, lane in priority_class.account_queues.items():
            streams.append(
                _Flow(iter(lane), account, quotas_left[account], priority_class.start_tag(account))
            )
        for order, stream in enumerate(streams):
            self._push(stream, order)

    def peek(self) -> QueuePosition | None:
        """The next."""
        return self._heap[0][2].head if self._heap else None

    def skip(self) -> None:
        """The next goes another way, or is not fit to go."""
        _, order, stream = heapq.heappop(self._heap)
        self._push(stream, order)

    def pop(self) -> float:
        """The next goes out; its place among all."""
        tag, order, stream = heapq.heappop(self._heap)
        stream.start_tag += 1
        if stream.head is not None and stream.head.entry.charged_claim is None:
            stream.remaining -= 1
        self._push(stream, order)
        return tag

    def _push(self, flow: _Flow, order: int) -> None:
        flow.head = next(flow.positions, None)
        if flow.head is None or (flow.remaining < 1 and flow.head.entry.charged_claim is None):
            return
        if flow.account is None:
            flow.start_tag = flow.head.start_tag
        heapq.heappush(self._heap, (flow.start_tag, order, flow))
