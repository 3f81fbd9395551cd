"""The read path: L1, then L2, then the queue for the model."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from services.cache_proxy.errors import DeadlinePassed, PairError, PairsFailed
from services.cache_proxy.key import Digester
from services.cache_proxy.l1 import L1Cache
from services.cache_proxy.queue import Asker, Outcome, Pair, Queue
from services.cache_proxy.refresher import Refresher
from services.cache_proxy.store.dated import Lifetime, dated, level_of, today
from services.cache_proxy.store.guarded import GuardedStore
from services.cache_proxy.waiters import Waiters

_BREATH_PAIRS = (
    500  # about 1.5 ms of work, after which others have their turn: a call to the model must be punctual
)


@dataclass(slots=True)
class Answers:
    """By position: each pair's level (0: none) and the outcome that its metrics count."""

    levels: list[int]
    outcomes: list[str]

    def counted(self) -> dict[str, int]:
        """How many pairs had which outcome."""
        return Counter(self.outcomes)


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

    async def resolve(self, texts: Sequence[tuple[str, str]], asker: Asker, answers: Answers) -> None:
        """Fill `answers` for every (company, title), also when it raises: then with all that is known.

        Raises `PairsFailed` when every pair has ended but some without a level, `QueueFull` and
        `DeadlinePassed` when pairs could not, or not in time, be asked.
        """
        epoch = self._l1.epoch  # before any look-up: what is invalidated from now on is not put back
        positions = await self._look_in_l1(texts, answers)
        if positions:
            await self._look_in_l2(texts, positions, epoch, answers)
        if positions:
            await self._ask_model(texts, positions, epoch, asker, answers)

    async def _look_in_l1(self, texts: Sequence[tuple[str, str]], answers: Answers) -> dict[bytes, list[int]]:
        """The positions of each pair that L1 does not know, or knows no more: L2 may know better."""
        missing: dict[bytes, list[int]] = {}
        day, lifetime = today(), self._lifetime
        for position, (company, title) in enumerate(texts):
            digest = self._digest(company, title)
            entry = self._l1.get(digest)
            if lifetime.is_fresh(entry, day=day):
                answers.levels[position], answers.outcomes[position] = level_of(entry), "l1"
            else:
                missing.setdefault(digest, []).append(position)
            if position % _BREATH_PAIRS == _BREATH_PAIRS - 1:
                await asyncio.sleep(0)
        return missing

    async def _look_in_l2(
        self,
        texts: Sequence[tuple[str, str]],
        positions: dict[bytes, list[int]],
        epoch: int,
        answers: Answers,
    ) -> None:
        """Answer what L2 knows, and take it out of `positions`; what is stale is asked again behind."""
        digests = list(positions)
        entries = await self._store.look_up(digests)
        day, stale = today(), list[Pair]()
        for digest, entry in zip(digests, entries, strict=True):
            if not entry:
                continue
            places = positions.pop(digest)
            outcome = "l2"
            if self._lifetime.is_fresh(entry, day=day):
                self._l1.put(digest, entry, epoch=epoch)
            else:
                outcome = "stale"
                stale.append(Pair(digest, *texts[places[0]]))
            for position in places:
                answers.levels[position], answers.outcomes[position] = level_of(entry), outcome
        self._refresher.ask(stale)

    async def _ask_model(
        self,
        texts: Sequence[tuple[str, str]],
        positions: dict[bytes, list[int]],
        epoch: int,
        asker: Asker,
        answers: Answers,
    ) -> None:
        pairs = [Pair(digest, *texts[places[0]]) for digest, places in positions.items()]
        queued: frozenset[bytes] = frozenset()
        started_at = asyncio.get_running_loop().time()
        wait = self._waiters.open(list(positions))
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
            self._note(wait.outcomes, positions, epoch, queued, answers)
            await self._queue.leave(self._waiters.close(wait))
        failures = {
            position: outcome
            for digest, outcome in wait.outcomes.items()
            if isinstance(outcome, PairError)
            for position in positions[digest]
        }
        if failures:
            raise PairsFailed(failures)

    def _note(
        self,
        outcomes: dict[bytes, Outcome],
        positions: dict[bytes, list[int]],
        epoch: int,
        queued: frozenset[bytes],
        answers: Answers,
    ) -> None:
        """Write down the levels: the first place of a pair that this request queued was `inferred` for it."""
        day = today()
        for digest, level in outcomes.items():
            if isinstance(level, int):
                self._l1.put(digest, dated(level, day), epoch=epoch)
                for position in positions[digest]:
                    answers.levels[position], answers.outcomes[position] = level, "coalesced"
                if digest in queued:
                    answers.outcomes[positions[digest][0]] = "inferred"
