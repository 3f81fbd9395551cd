"""The read path: L1, then L2, then the queue for the model."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence

from services.cache_proxy.breath import in_breaths
from services.cache_proxy.errors import DeadlinePassed, PairError, PairsFailed
from services.cache_proxy.hits import answer_known
from services.cache_proxy.key import Digester
from services.cache_proxy.l1 import L1Cache
from services.cache_proxy.queue import Asker, Outcome, Pair, Queue
from services.cache_proxy.refresher import Refresher
from services.cache_proxy.rpc_metrics import outcome_kind
from services.cache_proxy.store.dated import Lifetime, dated, level_of, today
from services.cache_proxy.store.guarded import GuardedStore
from services.cache_proxy.waiters import Waiters
from services.cache_proxy.wire import Unknown

BREATH_PAIRS = 500
"""Of those that are made into messages and hashed: about 2 ms of work."""

_Places = dict[bytes, list[Unknown]]


class Answers:
    """How many pairs a request has, how many of them L1 answered, and of the others, by position, the level
    and the outcome that its metrics count; those that are nowhere failed.
    """  # noqa: D205 - one thought

    __slots__ = ("by_l1", "levels", "outcomes", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.by_l1 = 0
        self.levels: dict[int, int] = {}
        self.outcomes: dict[int, str] = {}

    def counted(self) -> dict[str, int]:
        """How many pairs had which outcome."""
        if self.by_l1 == self.size:
            return {"l1": self.size}
        failed = self.size - self.by_l1 - len(self.outcomes)
        return {"l1": self.by_l1, "failed": failed, **Counter(self.outcomes.values())}

    @property
    def hits(self) -> int:
        """How many pairs a cache answered."""
        if self.by_l1 == self.size:
            return self.size
        return self.by_l1 + sum(outcome_kind(outcome) == "hit" for outcome in self.outcomes.values())


class Resolver:
    """Answers a request's pairs, or says of each why not."""

    def __init__(
        self, *, digest: Digester, l1: L1Cache, store: GuardedStore, queue: Queue, waiters: Waiters,
        lifetime: Lifetime,
    ) -> None:  # fmt: skip
        self._digest = digest
        self._l1 = l1
        self._store = store
        self._queue = queue
        self._waiters = waiters
        self._lifetime = lifetime
        self._refresher = Refresher(queue=queue, waiters=waiters)

    async def close(self) -> None:
        """Wait for no refresh any more."""
        await self._refresher.close()

    def answer_known(self, items: Sequence[bytes]) -> Awaitable[tuple[list[bytes], list[int]]]:
        """What L1 knows of a request's items: their answers, and the positions of those without one."""
        self._l1.expire(today())
        return answer_known(items, self._l1)

    async def resolve(self, pairs: Sequence[Unknown], asker: Asker, answers: Answers) -> None:
        """Fill `answers` for every pair that L1 did not know, also when it raises: then with what is known.

        Raises `PairsFailed` when every pair has ended but some without a level, `QueueFull` and
        `DeadlinePassed` when pairs could not, or not in time, be asked.
        """
        epoch = self._l1.epoch  # before any look-up: what is invalidated from now on must not come back
        places: _Places = {}
        async for some in in_breaths(pairs, BREATH_PAIRS):
            for pair in some:
                places.setdefault(self._digest(pair.company, pair.title), []).append(pair)
        await self._look_in_l2(places, epoch, answers)
        if places:
            await self._ask_model(places, epoch, asker, answers)

    async def _look_in_l2(self, places: _Places, epoch: int, answers: Answers) -> None:
        """Answer what L2 knows, and take it out of `places`; what is stale is asked again behind."""
        digests = list(places)
        entries = await self._store.look_up(digests)
        day, stale = today(), list[Pair]()
        async for some in in_breaths(list(zip(digests, entries, strict=True)), BREATH_PAIRS):
            for digest, entry in some:
                if not entry:
                    continue
                pairs = places.pop(digest)
                if self._lifetime.is_fresh(entry, day=day):
                    self._remember(digest, entry, pairs, epoch)
                    _note(level_of(entry), pairs, "l2", answers)
                else:
                    stale.append(Pair(digest, pairs[0].company, pairs[0].title))
                    _note(level_of(entry), pairs, "stale", answers)
        self._refresher.ask(stale)

    async def _ask_model(self, places: _Places, epoch: int, asker: Asker, answers: Answers) -> None:
        pairs = [Pair(digest, some[0].company, some[0].title) for digest, some in places.items()]
        queued: frozenset[bytes] = frozenset()
        started_at = asyncio.get_running_loop().time()
        wait = self._waiters.open(list(places))
        try:
            async with asyncio.timeout_at(asker.deadline):
                enqueued = await self._queue.enqueue(pairs, asker)
                queued = enqueued.queued
                self._waiters.settle_one(wait, enqueued.ended.items())
                await wait.done()
        except TimeoutError:
            waited_seconds = asyncio.get_running_loop().time() - started_at
            raise DeadlinePassed(waited_seconds) from None
        finally:
            self._note_outcomes(wait.outcomes, places, epoch, queued, answers)
            await self._queue.leave(self._waiters.close(wait))
        failures = {
            pair.position: outcome
            for digest, outcome in wait.outcomes.items()
            if isinstance(outcome, PairError)
            for pair in places[digest]
        }
        if failures:
            raise PairsFailed(failures)

    def _note_outcomes(
        self,
        outcomes: dict[bytes, Outcome],
        places: _Places,
        epoch: int,
        queued: frozenset[bytes],
        answers: Answers,
    ) -> None:
        """Note the levels: the first place of a pair that this request queued was `inferred` for it."""
        day = today()
        for digest, level in outcomes.items():
            if isinstance(level, int):
                self._remember(digest, dated(level, day), places[digest], epoch)
                _note(level, places[digest], "coalesced", answers)
                if digest in queued:
                    answers.outcomes[places[digest][0].position] = "inferred"

    def _remember(self, digest: bytes, entry: int, pairs: Sequence[Unknown], epoch: int) -> None:
        expires_day = self._lifetime.expires_day(entry)
        for pair in pairs:
            self._l1.put(pair.key, level_of(entry), digest=digest, epoch=epoch, expires_day=expires_day)


def _note(level: int, pairs: Sequence[Unknown], outcome: str, answers: Answers) -> None:
    for pair in pairs:
        answers.levels[pair.position], answers.outcomes[pair.position] = level, outcome
