"""The requests of this process that wait for pairs."""

import asyncio
import math
from collections.abc import Iterable, Sequence

from services.cache_proxy.domain import Outcome
from services.cache_proxy.errors import PairError


class Waiter:
    """One request that waits for distinct pairs, until each has an outcome.

    State: `_pending`, the pairs without an outcome; `outcomes`, those of the others; `abandoned`, the pairs
    that were failed for this request alone.
    """

    def __init__(self, digests: Sequence[bytes], deadline: float) -> None:
        self.deadline = deadline
        self.abandoned: list[bytes] = []
        self.outcomes: dict[bytes, Outcome] = {}
        self._pending = set(digests)
        self._all_resolved = asyncio.get_running_loop().create_future()

    def resolve(self, digest: bytes, outcome: Outcome) -> None:
        """Record the outcome of a pair, unless it has one already."""
        if digest in self._pending:
            self._pending.remove(digest)
            self.outcomes[digest] = outcome
            if not self._pending and not self._all_resolved.done():
                self._all_resolved.set_result(None)

    @property
    def pending(self) -> frozenset[bytes]:
        """Return the pairs that have no outcome yet."""
        return frozenset(self._pending)

    async def wait(self) -> None:
        """Return when every pair has an outcome."""
        if self._pending:
            await self._all_resolved


class WaiterRegistry:
    """Registry of all waiting requests of this process.

    State, touched only from the event loop: `_waiters`, all that are registered; `_by_digest`, the waiters of
    each pair that has not ended.

    Events that race:

    1. A waiter is registered before its pairs are enqueued, so an outcome that is published meanwhile
       finds it.
    2. It is unregistered however its request ends, and by identity. So it is known when the last waiter of a
       pair goes, and only then is the pair cancelled in the queue.
    """

    def __init__(self) -> None:
        self._waiters: set[Waiter] = set()
        self._by_digest: dict[bytes, set[Waiter]] = {}

    def register(self, digests: Sequence[bytes], *, deadline: float = math.inf) -> Waiter:
        """Add a waiter for these pairs. `deadline` is on the event loop's clock."""
        waiter = Waiter(digests, deadline)
        self._waiters.add(waiter)
        for digest in digests:
            self._by_digest.setdefault(digest, set()).add(waiter)
        return waiter

    def unregister(self, waiter: Waiter) -> list[bytes]:
        """Remove a waiter, and return its pairs without an outcome for which no other waits."""
        self._waiters.discard(waiter)
        unwanted = [digest for digest in waiter.abandoned if digest not in self._by_digest]
        unwanted += [digest for digest in waiter.pending if self._remove_from_pair(digest, waiter)]
        return unwanted

    def resolve(self, digest: bytes, outcome: Outcome) -> None:
        """Give a pair's outcome to all waiters for it."""
        for waiter in self._by_digest.pop(digest, ()):
            waiter.resolve(digest, outcome)

    def fail_with_deadline_before(self, moment: float, error: PairError) -> None:
        """Fail the waiters whose deadline is before this time, at which the model is called next."""
        for waiter in [waiter for waiter in self._waiters if waiter.deadline < moment]:
            self.fail_waiter(waiter, error)

    def fail_waiter(self, waiter: Waiter, error: PairError) -> None:
        """Fail all pending pairs of one waiter. Other waiters for the same pairs are not affected."""
        waiter.abandoned += waiter.pending
        self.resolve_one(waiter, [(digest, error) for digest in waiter.pending])

    def resolve_one(self, waiter: Waiter, outcomes: Iterable[tuple[bytes, Outcome]]) -> None:
        """Give outcomes to one waiter only."""
        for digest, outcome in outcomes:
            self._remove_from_pair(digest, waiter)
            waiter.resolve(digest, outcome)

    def _remove_from_pair(self, digest: bytes, waiter: Waiter) -> bool:
        """Remove a waiter from a pair. Return whether it was the pair's last one."""
        waiters = self._by_digest.get(digest)
        if waiters is None:
            return False
        waiters.discard(waiter)
        if waiters:
            return False
        del self._by_digest[digest]
        return True
