"""The read path: L1, then L2, then the queue for the model."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from services.cache_proxy import fast_path
from services.cache_proxy.cache.entry import Lifetime, dated, level_of
from services.cache_proxy.cache.key import BatchDigester
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.cache.resilient_store import GuardedStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.errors import DeadlinePassed, PairError, PairsFailed, Unavailable
from services.cache_proxy.observability.rpc_metrics import outcome_kind
from services.cache_proxy.queue.interface import Asker, Outcome, Pair, Queue
from services.cache_proxy.queue.waiters import Waiters
from services.cache_proxy.refresher import Refresher
from services.cache_proxy.wire.request_parser import BREATH_BYTES, BREATH_PAIRS, Asked
from services.common.checkpoint import in_breaths, take_turn
from services.common.tracing import OFF, Tracing

_LOOK_UP_PAIRS = 4000
"""Of a large request at once: what the store of a Cluster takes together. It is under 1 ms of work."""

_Places = dict[bytes, list[int]]


class Answers:
    """How many pairs a request has, and how many of them had which outcome; the others failed.

    `levels` are of those that L1 did not know, by their place in `Asked`: 0 where there is none.
    """

    __slots__ = ("_outcomes", "levels", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.levels: list[int] = []
        self._outcomes: dict[str, int] = {}

    def count(self, outcome: str, pairs: int) -> None:
        """Note that so many pairs had this outcome."""
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + pairs

    def counted(self) -> dict[str, int]:
        """How many pairs had which outcome."""
        return {"failed": self.size - sum(self._outcomes.values()), **self._outcomes}

    @property
    def hits(self) -> int:
        """How many pairs a cache answered."""
        return sum(count for outcome, count in self._outcomes.items() if outcome_kind(outcome) == "hit")


class Resolver:
    """Answers a request's pairs, or says of each why not."""

    def __init__(
        self, *, digests: BatchDigester, l1: L1Cache, store: GuardedStore, queue: Queue, waiters: Waiters,
        lifetime: Lifetime, clock: StoreClock, tracing: Tracing = OFF,
    ) -> None:  # fmt: skip
        self._digests = digests
        self._l1 = l1
        self._store = store
        self._queue = queue
        self._waiters = waiters
        self._lifetime = lifetime
        self._clock = clock
        self._tracing = tracing
        self._refresher = Refresher(queue=queue, waiters=waiters)

    async def close(self) -> None:
        """Wait for no refresh any more."""
        await self._refresher.close()

    def answer_one(self, message: bytes) -> bytes | None:
        """The answer to a whole request, if that is one pair which L1 knows."""
        self._l1.expire(self._clock.today())
        return fast_path.answer_one(message, self._l1)

    async def answer_known(self, items: Sequence[bytes]) -> tuple[list[bytes], Sequence[int]]:
        """What L1 knows of a request's items: their answers, and the positions of those without one."""
        if not self._l1.is_on:
            return [b""] * len(items), range(len(items))
        self._l1.expire(self._clock.today())
        return await fast_path.answer_known(items, self._l1)

    async def resolve(self, asked: Asked, asker: Asker, answers: Answers) -> None:
        """Fill `answers` for every pair that L1 did not know, also when it raises: then with what is known.

        Raises `PairsFailed` when every pair has ended but some without a level, `QueueFull` and
        `DeadlinePassed` when pairs could not, or not in time, be asked.
        """
        epoch = self._l1.epoch  # before any look-up: what is invalidated from now on must not come back
        digests: list[bytes] = []
        async for some in in_breaths(asked.items, BREATH_PAIRS, size=len, most_size=BREATH_BYTES):
            first, last = len(digests), len(digests) + len(some)
            digests += self._digests(asked.texts[2 * first : 2 * last])
        missing: _Places = {}
        async for few in in_breaths(digests, _LOOK_UP_PAIRS):
            await self._look_in_l2(few, asked, epoch, answers, missing)
        if missing:
            await self._ask_model(missing, asked, epoch, asker, answers)

    async def _look_in_l2(
        self, digests: Sequence[bytes], asked: Asked, epoch: int, answers: Answers, missing: _Places
    ) -> None:
        """Answer what L2 knows of the next places; what is stale is asked again behind."""
        with self._tracing.span("store.look_up", pairs=len(digests)) as span:
            first, entries = len(answers.levels), await self._entries(digests)
            span.note(found=len(entries) - entries.count(0))
        day, counts = self._clock.today(), Counter(entries)  # few different ones: each is judged once
        fresh = {entry for entry in counts if self._lifetime.is_fresh(entry, day=day)}
        levels = {entry: level_of(entry) for entry in counts}
        answers.levels += [levels[entry] for entry in entries]
        for entry in levels.keys() - {0}:
            answers.count("l2" if entry in fresh else "stale", counts[entry])
        if len(fresh) < len(counts):
            stale: dict[bytes, Pair] = {}
            for place, (digest, entry) in enumerate(zip(digests, entries, strict=True), first):
                if not entry:
                    missing.setdefault(digest, []).append(place)
                elif entry not in fresh and digest not in stale:
                    stale[digest] = asked.pair(place, digest)
            self._refresher.ask(list(stale.values()))
        if self._l1.is_on and fresh:
            last = first + len(digests)
            columns = zip(range(first, last), digests, entries, strict=True)
            items = asked.items[first:last]
            async for some in in_breaths(items, BREATH_PAIRS, size=len, most_size=BREATH_BYTES):
                for place, digest, entry in islice(columns, len(some)):
                    if entry in fresh:
                        self._remember(digest, entry, asked.key(place), epoch)

    async def _entries(self, digests: Sequence[bytes]) -> Sequence[int]:
        """What L2 knows of each, by position; what is there twice is looked up once."""
        distinct = set(digests)
        if len(distinct) == len(digests):
            return await self._store.look_up(digests)
        once = list(distinct)
        entries = dict(zip(once, await self._store.look_up(once), strict=True))
        return [entries[digest] for digest in digests]

    async def _ask_model(
        self, places: _Places, asked: Asked, epoch: int, asker: Asker, answers: Answers
    ) -> None:
        is_long = len(places) > _LOOK_UP_PAIRS  # then what is done at one go here is tenths of a second
        if is_long:
            await take_turn()
        pairs = [asked.pair(some[0], digest) for digest, some in places.items()]
        queued: frozenset[bytes] = frozenset()
        started_at = asyncio.get_running_loop().time()
        wait = self._waiters.open(list(places), deadline=asker.deadline)
        try:
            with self._tracing.span("queue.wait", pairs=len(pairs), priority=asker.priority) as span:
                async with asyncio.timeout_at(asker.deadline):
                    enqueued = await self._queue.enqueue(pairs, asker)
                    queued = enqueued.queued
                    span.note(queued=len(queued), joined=len(pairs) - len(queued) - len(enqueued.ended))
                    self._waiters.settle_one(wait, enqueued.ended.items())
                    await wait.done()
                    if is_long:  # one call of the model ends the waits of many
                        await take_turn()
        except Unavailable as error:  # nothing of it was queued
            self._waiters.give_up(wait, error)
        except TimeoutError:
            waited_seconds = asyncio.get_running_loop().time() - started_at
            raise DeadlinePassed(waited_seconds) from None
        finally:
            self._note_outcomes(wait.outcomes, places, asked, epoch, queued, answers)
            await self._queue.leave(self._waiters.close(wait))
        failures = {
            asked.positions[place]: outcome.told_to(asker.request)
            for digest, outcome in wait.outcomes.items()
            if isinstance(outcome, PairError)
            for place in places[digest]
        }
        if failures:
            raise PairsFailed(failures)

    def _note_outcomes(
        self, outcomes: dict[bytes, Outcome], places: _Places, asked: Asked, epoch: int,
        queued: frozenset[bytes], answers: Answers,
    ) -> None:  # fmt: skip
        """Note the levels: the first place of a pair that this request queued was `inferred` for it."""
        day = self._clock.today()
        for digest, level in outcomes.items():
            if isinstance(level, int):
                inferred = digest in queued
                answers.count("inferred", inferred)
                answers.count("coalesced", len(places[digest]) - inferred)
                for place in places[digest]:
                    answers.levels[place] = level
                    self._remember(digest, dated(level, day), asked.key(place), epoch)

    def _remember(self, digest: bytes, entry: int, key: bytes, epoch: int) -> None:
        expires_day = self._lifetime.expires_day(entry)
        self._l1.put(key, level_of(entry), digest=digest, epoch=epoch, expires_day=expires_day)
