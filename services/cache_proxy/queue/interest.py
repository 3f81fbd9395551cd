"""The pairs for which requests wait at this replica."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import PairError
from services.cache_proxy.queue.interface import OutcomeCallback, RequestContext
from services.cache_proxy.queue.quotas import Quota, QuotaProvider
from services.cache_proxy.queue.waiting_pairs import Requester, WaitingPair, WaitingSnapshot


class InterestTable:
    """Table of all pairs for which requests wait here, whether Redis or the local queue holds them.

    State: `_pairs`, the waiting pairs by digest. It is touched only from the event loop and never across an
    await. A pair is added before the script that queues it runs, so an outcome that is published in between
    finds it.
    """

    def __init__(self, *, on_outcome: OutcomeCallback, quotas: QuotaProvider) -> None:
        self._on_outcome = on_outcome
        self._quotas = quotas
        self._pairs: dict[bytes, WaitingPair] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def count(self, priority: str) -> int:
        """Return the number of pairs whose best priority this is."""
        return sum(waiting.priority == priority for waiting in self._pairs.values())

    def quota_for(self, context: RequestContext) -> Quota | None:
        """Return the quota that limits a request, None if none does: refreshes have no quota."""
        return None if context.priority == "refresh" else self._quotas().for_caller(context.caller)

    def register(self, pairs: Sequence[Pair], context: RequestContext) -> list[bytes]:
        """Add the pairs of a request, and return the digests that were not in the table before.

        A pair that was there is wanted until the later of both deadlines from now on. It gets the request's
        priority only when the queue has admitted the request: see `add_requester`.
        """
        new_digests = []
        requesters = (self._requester(context),)
        for pair in pairs:
            known = self._pairs.get(pair.digest)
            if known is None:
                new_digests.append(pair.digest)
                self._pairs[pair.digest] = WaitingPair(
                    pair, requesters, context.deadline, context.trace_context
                )
            else:
                known.is_shared = True
                known.deadline = max(known.deadline, context.deadline)
        return new_digests

    def add_requester(self, pairs: Sequence[Pair], context: RequestContext) -> None:
        """Give the pairs of an admitted request its priority, where that is better than the one they have."""
        requester = self._requester(context)
        for pair in pairs:
            waiting = self._pairs.get(pair.digest)
            if waiting is not None:
                waiting.add_requester(requester)

    def remove(self, digests: Collection[bytes]) -> list[bytes]:
        """Remove pairs for which no request waits any more, and return those that were in the table."""
        return [digest for digest in digests if self._pairs.pop(digest, None) is not None]

    def unshared(self, digests: Collection[bytes]) -> list[bytes]:
        """Return those of the digests for which only one request waits."""
        return [digest for digest in digests if digest in self._pairs and not self._pairs[digest].is_shared]

    def resolve(self, digest: bytes, outcome: Outcome) -> None:
        """Remove a pair, and report its outcome to the requests that wait for it."""
        self._pairs.pop(digest, None)
        self._on_outcome(digest, outcome)

    def resolve_all(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Resolve each pair of `outcomes`."""
        for digest, outcome in outcomes.items():
            self.resolve(digest, outcome)

    def fail_all(self, error: PairError) -> None:
        """Resolve every waiting pair with the error."""
        self.resolve_all(dict.fromkeys(self._pairs, error))

    def apply_known_outcomes(
        self, outcomes: Mapping[bytes, Outcome], *, new_digests: Collection[bytes]
    ) -> None:
        """Remove pairs that the queue found to have ended when a request enqueued them.

        That request gets the outcomes as its result. To other requests for the same pairs they are reported
        here, whether those came before it or while it was enqueued. `new_digests` are the pairs that the
        request added.
        """
        added = set(new_digests)
        for digest, outcome in outcomes.items():
            waiting = self._pairs.pop(digest, None)
            if waiting is not None and (waiting.is_shared or digest not in added):
                self._on_outcome(digest, outcome)

    def snapshot(self) -> WaitingSnapshot:
        """Return the state of each pair that waits now."""
        return {
            digest: (waiting, waiting.requesters, waiting.deadline) for digest, waiting in self._pairs.items()
        }

    def unchanged_since(self, earlier: WaitingSnapshot) -> set[bytes]:
        """Return the pairs that are as they were in an earlier snapshot.

        A pair that was removed and added again, or that another request joined, has changed.
        """
        return {
            digest
            for digest, (waiting, requesters, deadline) in earlier.items()
            if self._pairs.get(digest) is waiting
            and waiting.requesters is requesters
            and waiting.deadline == deadline
        }

    def contexts(self, *, exclude: Collection[bytes]) -> list[tuple[Pair, RequestContext]]:
        """Return all pairs but the excluded ones, once for each of their requesters."""
        return [
            (waiting.pair, context)
            for digest, waiting in self._pairs.items()
            if digest not in exclude
            for context in waiting.request_contexts()
        ]

    def grouped(self, *, exclude: Collection[bytes]) -> Iterator[tuple[RequestContext, list[Pair]]]:
        """Yield all pairs but the excluded ones, grouped by caller, priority and trace.

        A group's context has the latest deadline of its pairs. A pair is in a group for each requester.
        """
        groups: dict[tuple[str, str, bytes], list[WaitingPair]] = {}
        for digest, waiting in self._pairs.items():
            if digest in exclude:
                continue
            for requester in waiting.requesters:
                key = (requester.caller, requester.priority, waiting.trace_context)
                groups.setdefault(key, []).append(waiting)
        for (caller, priority, trace_context), group in groups.items():
            deadline = max(waiting.deadline for waiting in group)
            context = RequestContext(caller, priority, deadline, trace_context)
            yield context, [waiting.pair for waiting in group]

    def _requester(self, context: RequestContext) -> Requester:
        quota = self.quota_for(context)
        return Requester(None if quota is None else quota.account, context.caller, context.priority)
