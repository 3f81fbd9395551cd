"""Who, in this process, waits for which pairs."""

import asyncio
from collections.abc import Iterable, Sequence

from services.cache_proxy.queue import Outcome


class Wait:
    """One request's wait for a number of distinct pairs; done when each has an outcome."""

    def __init__(self, digests: Sequence[bytes]) -> None:
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
    """State: `_by_digest`, the waits for each pair that has not ended; event loop only.

    Racing events: a wait is opened *before* its pairs are enqueued, so an answer that is published while
    the enqueue is under way finds it; it is closed whatever happens to the caller, by identity, so that the
    last to go is known, and only then is the queue told that nobody waits here.
    """

    def __init__(self) -> None:
        self._by_digest: dict[bytes, set[Wait]] = {}

    def open(self, digests: Sequence[bytes]) -> Wait:
        """Begin a wait."""
        wait = Wait(digests)
        for digest in digests:
            self._by_digest.setdefault(digest, set()).add(wait)
        return wait

    def close(self, wait: Wait) -> list[bytes]:
        """End a wait; the pairs without an outcome for which nobody waits any more."""
        left = []
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

    def settle_one(self, wait: Wait, outcomes: Iterable[tuple[bytes, Outcome]]) -> None:
        """Give outcomes to one wait alone."""
        for digest, outcome in outcomes:
            waits = self._by_digest.get(digest)
            if waits is not None:
                waits.discard(wait)
                if not waits:
                    del self._by_digest[digest]
            wait.settle(digest, outcome)
