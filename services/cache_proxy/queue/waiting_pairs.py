"""What a replica keeps of each pair for which it has waiting requests: enough to enqueue the pair again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.cache_proxy.domain import PRIORITY_CLASSES, Pair
from services.cache_proxy.queue.interface import RequestContext

_MAX_REQUESTERS = 8  # of one pair, as it has places in Redis (MAX_PLACES)


@dataclass(frozen=True, slots=True)
class Requester:
    """Where a pair waits for one of its callers: `account` is None where no quota binds the caller."""

    account: str | None
    caller: str
    priority: str


@dataclass(slots=True)
class WaitingPair:
    """A pair that waits: in the best turn of each account, until the latest deadline of its requests."""

    pair: Pair
    requesters: tuple[Requester, ...]  # shared by all pairs of a request, as long as no other joins them
    deadline: float
    trace_context: bytes
    is_shared: bool = False  # by more than one request

    @property
    def priority(self) -> str:
        """Return the best priority of all requests that wait."""
        return min((turn.priority for turn in self.requesters), key=PRIORITY_CLASSES.index)

    def add_requester(self, requester: Requester) -> None:
        """Have the pair wait in this turn too, unless it has one of that account that is as good."""
        for at, known in enumerate(self.requesters):
            if known.account == requester.account:
                if PRIORITY_CLASSES.index(requester.priority) < PRIORITY_CLASSES.index(known.priority):
                    self.requesters = (*self.requesters[:at], requester, *self.requesters[at + 1 :])
                return
        if len(self.requesters) < _MAX_REQUESTERS:
            self.requesters = (*self.requesters, requester)

    def request_contexts(self) -> Iterator[RequestContext]:
        """Yield an asker for each turn: enqueued for all of them, the pair waits as it did."""
        for turn in self.requesters:
            yield RequestContext(turn.caller, turn.priority, self.deadline, self.trace_context)


WaitingSnapshot = Mapping[bytes, tuple[WaitingPair, tuple[Requester, ...], float]]
"""What was known of each pair at some time: see `RedisQueue.noted`."""
