"""One pair for which requests wait at this replica, with all that is needed to enqueue it again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.cache_proxy.domain import PRIORITY_CLASSES, Pair
from services.cache_proxy.queue.interface import RequestContext

# A pair has as many positions in Redis (`MAX_PLACES` in the Lua scripts).
_MAX_REQUESTERS = 8


@dataclass(frozen=True, slots=True)
class Requester:
    """A caller that waits for a pair, with its priority.

    `account` names the quota that limits the caller, None if no quota does.
    """

    account: str | None
    caller: str
    priority: str


@dataclass(slots=True)
class WaitingPair:
    """A pair and the requests that wait for it.

    - `requesters`: one for each quota account, the one with the best priority. The tuple is shared by all
      pairs of a request until another request joins one of them.
    - `deadline`: the latest deadline of all requests, on the event loop's clock.
    - `is_shared`: whether more than one request waits.
    """

    pair: Pair
    requesters: tuple[Requester, ...]
    deadline: float
    trace_context: bytes
    is_shared: bool = False

    @property
    def priority(self) -> str:
        """Return the best priority of all requests that wait."""
        return min((requester.priority for requester in self.requesters), key=PRIORITY_CLASSES.index)

    def add_requester(self, requester: Requester) -> None:
        """Add a requester, or replace the one of the same account if the new priority is better."""
        for index, known in enumerate(self.requesters):
            if known.account == requester.account:
                if PRIORITY_CLASSES.index(requester.priority) < PRIORITY_CLASSES.index(known.priority):
                    self.requesters = (*self.requesters[:index], requester, *self.requesters[index + 1 :])
                return
        if len(self.requesters) < _MAX_REQUESTERS:
            self.requesters = (*self.requesters, requester)

    def request_contexts(self) -> Iterator[RequestContext]:
        """Yield one request context for each requester.

        Enqueued once with each of them, the pair waits in another queue as it waits here.
        """
        for requester in self.requesters:
            yield RequestContext(requester.caller, requester.priority, self.deadline, self.trace_context)


WaitingSnapshot = Mapping[bytes, tuple[WaitingPair, tuple[Requester, ...], float]]
"""Pairs that waited at some time, by digest: the pair, its requesters, and its deadline then."""
