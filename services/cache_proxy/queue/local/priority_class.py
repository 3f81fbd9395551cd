"""The lanes of one priority: its own, fair between callers, and those of the accounts, in turn with them."""

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.cache_proxy.queue.local.fair_queue import Entry, FairLane, Place


@dataclass(slots=True)
class _Stream:
    """What one lane may send: `left` pairs that are not paid for yet. `tag` is its head's place among all."""

    places: Iterator[Place]
    account: str | None
    left: float
    tag: float = 0.0
    head: Place | None = None


class PriorityLanes:
    """State: `own`; `accounts`, lanes of those with pairs here; `_ends`, where an account's last one ends.

    An account's pairs have their places in its own lane, and line up with the others only as they go out:
    what a quota held back has not stood in front meanwhile.
    """

    def __init__(self, priority: str) -> None:
        self.priority = priority
        self.own = FairLane(alone=False)
        self.accounts: dict[str, FairLane] = {}
        self._ends: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.own) + sum(map(len, self.accounts.values()))

    def count(self, account: str) -> int:
        """How many of the account's wait here."""
        lane = self.accounts.get(account)
        return 0 if lane is None else len(lane)

    def lane(self, account: str | None) -> FairLane:
        """Where the account's pairs wait, or would; of none, those of whoever has no account."""
        if account is None:
            return self.own
        return self.accounts.get(account) or FairLane()

    def __contains__(self, place: Place) -> bool:
        return place in self.lane(place.account)

    def add(self, place: Place, *, front: bool = False) -> None:
        """Have it wait."""
        lane = self.lane(place.account)
        lane.add(place, front=front)
        if place.account is not None:
            self.accounts[place.account] = lane

    def remove(self, place: Place) -> None:
        """Take one out that is there."""
        lane = self.lane(place.account)
        lane.remove(place)
        if not len(lane) and place.account is not None:
            del self.accounts[place.account]
        if not len(self):
            self.own.begin_anew()
            self._ends.clear()

    def start_of(self, account: str) -> float:
        """Where the account's next pair starts among all."""
        return max(self.own.virtual, self._ends.get(account, 0.0))

    def advance(self, place: Place, tag: float) -> None:
        """It goes out, as the one that starts there among all."""
        self.own.advance(tag)
        if place.account is not None:
            self.lane(place.account).advance(place.start)
            self._ends[place.account] = tag + 1

    def oldest(self, allowances: Mapping[str, float]) -> Iterator[Entry]:
        """Who came first in each lane that may send."""
        for account, lane in self.accounts.items():
            first = lane.oldest()
            if first is not None and (allowances[account] or first.paid_by is not None):
                yield first
        first = self.own.oldest()
        if first is not None:
            yield first


class Offers:
    """What may go out of a priority's lanes now, in its order. They must not change meanwhile."""

    def __init__(self, lanes: PriorityLanes, allowances: Mapping[str, float]) -> None:
        self._lanes = lanes
        self._heap: list[tuple[float, int, _Stream]] = []
        streams = [_Stream(iter(lanes.own), None, math.inf)]
        for account, lane in lanes.accounts.items():
            streams.append(_Stream(iter(lane), account, allowances[account], lanes.start_of(account)))
        for order, stream in enumerate(streams):
            self._push(stream, order)

    def head(self) -> Place | None:
        """The next."""
        return self._heap[0][2].head if self._heap else None

    def skip(self) -> None:
        """The next goes another way, or is not fit to go."""
        _, order, stream = heapq.heappop(self._heap)
        self._push(stream, order)

    def take(self) -> float:
        """The next goes out; its place among all."""
        tag, order, stream = heapq.heappop(self._heap)
        stream.tag += 1
        if stream.head is not None and stream.head.entry.paid_by is None:
            stream.left -= 1
        self._push(stream, order)
        return tag

    def _push(self, stream: _Stream, order: int) -> None:
        stream.head = next(stream.places, None)
        if stream.head is None or (stream.left < 1 and stream.head.entry.paid_by is None):
            return
        if stream.account is None:
            stream.tag = stream.head.start
        heapq.heappush(self._heap, (stream.tag, order, stream))
