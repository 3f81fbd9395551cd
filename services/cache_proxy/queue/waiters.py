"""Who, in this process, waits for which pairs."""

import asyncio
import math
from collections.abc import Iterable, Sequence

from services.cache_proxy.domain import Outcome
from services.cache_proxy.errors import PairError


class Waiter:
    """One request's wait for a number of distinct pairs; done when each has an outcome.

    `given_up` are those that ended for this request alone.
    """

    def __init__(self, digests: Sequence[bytes], deadline: float) -> None:
        self.deadline = deadline
        self.abandoned: list[bytes] = []
        self.outcomes: dict[bytes, Outcome] = {}
        self._pending = set(digests)
        self._all_resolved = asyncio.get_running_loop().create_future()

    def resolve(self, digest: bytes, outcome: Outcome) -> None:
        """Note an outcome; the first one counts."""
        if digest in self._pending:
            self._pending.remove(digest)
            self.outcomes[digest] = outcome
            if not self._pending and not self._all_resolved.done():
                self._all_resolved.set_result(None)

    @property
    def pending(self) -> frozenset[bytes]:
        """The pairs that have no outcome yet."""
        return frozenset(self._pending)

    async def wait(self) -> None:
        """Return when every pair has an outcome."""
        if self._pending:
            await self._all_resolved


class WaiterRegistry:
    """State: `_waits`, all that are open; `_by_digest`, those of each pair that has not ended.

    It is touched from the event loop only.

    Racing events: a wait is opened *before* its pairs are enqueued, so an answer that is published while
    the enqueue is under way finds it; it is closed whatever happens to the caller, by identity, so that the
    last to go is known, and only then is the queue told that nobody waits here.
    """

    def __init__(self) -> None:
        self._waiters: set[Waiter] = set()
        self._by_digest: dict[bytes, set[Waiter]] = {}

    def register(self, digests: Sequence[bytes], *, deadline: float = math.inf) -> Waiter:
        """Begin a wait; `deadline` is on the event loop's clock."""
        wait = Waiter(digests, deadline)
        self._waiters.add(wait)
        for digest in digests:
            self._by_digest.setdefault(digest, set()).add(wait)
        return wait

    def unregister(self, waiter: Waiter) -> list[bytes]:
        """End a wait; the pairs without an outcome for which nobody waits any more."""
        self._waiters.discard(waiter)
        left = [digest for digest in waiter.abandoned if digest not in self._by_digest]
        for digest in waiter.pending:
            waits = self._by_digest.get(digest)
            if waits is not None:
                waits.discard(waiter)
                if not waits:
                    del self._by_digest[digest]
                    left.append(digest)
        return left

    def resolve(self, digest: bytes, outcome: Outcome) -> None:
        """Give an outcome to every wait for the pair."""
        for wait in self._by_digest.pop(digest, ()):
            wait.resolve(digest, outcome)

    def fail_with_deadline_before(self, moment: float, error: PairError) -> None:
        """End the waits whose deadline comes before this moment, when the model is called next."""
        for wait in [wait for wait in self._waiters if wait.deadline < moment]:
            self.fail_waiter(wait, error)

    def fail_waiter(self, waiter: Waiter, error: PairError) -> None:
        """End what is open of one wait alone; the pairs go on for whoever else waits."""
        waiter.abandoned += waiter.pending
        self.resolve_one(waiter, [(digest, error) for digest in waiter.pending])

    def resolve_one(self, waiter: Waiter, outcomes: Iterable[tuple[bytes, Outcome]]) -> None:
        """Give outcomes to one wait alone."""
        for digest, outcome in outcomes:
            waits = self._by_digest.get(digest)
            if waits is not None:
                waits.discard(waiter)
                if not waits:
                    del self._by_digest[digest]
            waiter.resolve(digest, outcome)
