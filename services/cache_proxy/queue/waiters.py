"""Who, in this process, waits for which pairs."""

import asyncio
import math
from collections.abc import Iterable, Sequence

from services.cache_proxy.errors import PairError
from services.cache_proxy.queue.interface import Outcome


class Wait:
    """One request's wait for a number of distinct pairs; done when each has an outcome.

    `given_up` are those that ended for this request alone.
    """

    def __init__(self, digests: Sequence[bytes], deadline: float) -> None:
        self.deadline = deadline
        self.given_up: list[bytes] = []
        self.outcomes: dict[bytes, Outcome] = {}
        self._open = set(digests)
        self._done = asyncio.get_running_loop().create_future()

    def settle(self, digest: bytes, outcome: Outcome) -> None:
        """Note an outcome; the first one counts."""
        if digest in self._open:
            self._open.remove(digest)
            self.outcomes[digest] = outcome
            if not self._open and not self._done.done():
                self._done.set_result(None)

    @property
    def open(self) -> frozenset[bytes]:
        """The pairs that have no outcome yet."""
        return frozenset(self._open)

    async def done(self) -> None:
        """Return when every pair has an outcome."""
        if self._open:
            await self._done


class Waiters:
    """State: `_waits`, all that are open; `_by_digest`, those of each pair that has not ended.

    It is touched from the event loop only.

    Racing events: a wait is opened *before* its pairs are enqueued, so an answer that is published while
    the enqueue is under way finds it; it is closed whatever happens to the caller, by identity, so that the
    last to go is known, and only then is the queue told that nobody waits here.
    """

    def __init__(self) -> None:
        self._waits: set[Wait] = set()
        self._by_digest: dict[bytes, set[Wait]] = {}

    def open(self, digests: Sequence[bytes], *, deadline: float = math.inf) -> Wait:
        """Begin a wait; `deadline` is on the event loop's clock."""
        wait = Wait(digests, deadline)
        self._waits.add(wait)
        for digest in digests:
            self._by_digest.setdefault(digest, set()).add(wait)
        return wait

    def close(self, wait: Wait) -> list[bytes]:
        """End a wait; the pairs without an outcome for which nobody waits any more."""
        self._waits.discard(wait)
        left = [digest for digest in wait.given_up if digest not in self._by_digest]
        for digest in wait.open:
            waits = self._by_digest.get(digest)
            if waits is not None:
                waits.discard(wait)
                if not waits:
                    del self._by_digest[digest]
                    left.append(digest)
        return left

    def settle(self, digest: bytes, outcome: Outcome) -> None:
        """Give an outcome to every wait for the pair."""
        for wait in self._by_digest.pop(digest, ()):
            wait.settle(digest, outcome)

    def give_up_before(self, moment: float, error: PairError) -> None:
        """End the waits whose deadline comes before this moment, when the model is called next."""
        for wait in [wait for wait in self._waits if wait.deadline < moment]:
            self.give_up(wait, error)

    def give_up(self, wait: Wait, error: PairError) -> None:
        """End what is open of one wait alone; the pairs go on for whoever else waits."""
        wait.given_up += wait.open
        self.settle_one(wait, [(digest, error) for digest in wait.open])

    def settle_one(self, wait: Wait, outcomes: Iterable[tuple[bytes, Outcome]]) -> None:
        """Give outcomes to one wait alone."""
        for digest, outcome in outcomes:
            waits = self._by_digest.get(digest)
            if waits is not None:
                waits.discard(wait)
                if not waits:
                    del self._by_digest[digest]
            wait.settle(digest, outcome)
