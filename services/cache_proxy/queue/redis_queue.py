"""The miss queue of all replicas, in Redis: this replica's side of it."""

import asyncio
import itertools
import logging
import math
import random
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from services.cache_proxy.batching import Riders
from services.cache_proxy.errors import PairError, QueueFull, StoreError, Unavailable
from services.cache_proxy.observability.metrics import LANES, ProxyMetrics
from services.cache_proxy.queue import rejections
from services.cache_proxy.queue.interface import (
    MAX_FAILED_BATCHES,
    MAX_REFUSALS,
    NONSENSE_SECONDS,
    Asker,
    Claim,
    Enqueued,
    GiveUp,
    NotYet,
    Outcome,
    Pair,
    QueueLimits,
    Settle,
)
from services.cache_proxy.queue.local.gcra import PACE
from services.cache_proxy.queue.outage import (
    BACKOFF_SPREAD,
    MAX_BACKOFF_SECONDS,
    MAX_BREAKDOWN_BACKOFF_SECONDS,
    MAX_BREAKDOWNS,
    MIN_BACKOFF_SECONDS,
    Outage,
)
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.quotas import Quota, QuotasNow, none
from services.cache_proxy.queue.serialization import pack, pack_error, unpack, unpack_error
from services.cache_proxy.queue.snapshot import MAX_REPORT_BYTES, MAX_REPORTS, Overview, read_overview
from services.cache_proxy.queue.waiting_pairs import Noted, Turn, WaitingPair

_log = logging.getLogger(__name__)

_CHUNK_PAIRS = 500  # a script call of this size holds Redis for about 5 ms
_PAIR_BYTES = 1024  # texts beyond that count as so many pairs more
_JOINED, _FAILED, _QUEUED = 17, 18, 16
_LEASE_MARGIN_SECONDS = 5.0
_AHEAD_MS = 60
_TIMERS_MS = 2  # scripts and the loop's timers count whole milliseconds, and each rounds up
_FIRST_ASIDE_SECONDS, _ASIDE_SECONDS = 30.0, 60.0  # while others' calls are answered and its own failed
_HELP_SECONDS = 1.0
_MIN_PUSHBACK_SECONDS = 1.0
_DEFER_SECONDS = 0.2  # whose calls just failed lets another replica have the next slot
_PART_SECONDS = 0.06  # for two parts of 500 to be published, on a machine with little time
_OTHERS_SECONDS = 0.5  # whoever queued a pair claims it; whose replica is gone or paused does not
_LEVEL_BYTES = 17
_DIGEST_BYTES = 16
_LEVELS = range(1, 8)
_PAIRS = 7  # the place of a request's pairs in it
_MAX_PATIENCE_SECONDS = 86_400.0
_UNREADABLE_RETRY_SECONDS = 1.0


class RedisQueue:
    """State: `_asked`, the pairs for which somebody waits here, and `_held`, the claims in work here.

    And `_own`, this replica's own failed calls in a row, and `_not_before` which it claims nothing after
    them: others may be able to call the model. `_help_until`: until then it claims what others cannot send.

    And `run`, the server that the last heartbeat reached (the listener's to set), and `_look`, when to ask
    for a call of what others queued. All are touched only from
    the event loop. A pair is in `_asked` before the script that queues it runs, so an answer published in
    between finds it. A lost message costs nothing for long: messages are numbered, and the heartbeat brings
    the last number (`listener.py`).
    """

    def __init__(
        self, scripts: Scripts, *, replica: str, limits: QueueLimits, lease_seconds: float,
        settle: Settle, metrics: ProxyMetrics, quotas: QuotasNow = none,
        give_up: GiveUp = lambda *_: None,
    ) -> None:  # fmt: skip
        self._scripts = scripts
        self.replica = replica
        self.run = ""
        self._limits = limits
        self._linger_ms = max(0, round(limits.linger_seconds * 1000) - _TIMERS_MS)
        self._lease_ms = round((lease_seconds + _LEASE_MARGIN_SECONDS) * 1000)
        self._settle = settle
        self._give_up = give_up
        self._metrics = metrics
        self._quotas = quotas
        self._together = Riders(
            self._enqueue_together,
            size=lambda request: sum(_weight(size_bytes) for *_, size_bytes in request[_PAIRS]),
            most=_CHUNK_PAIRS,
        )
        self._asked: dict[bytes, WaitingPair] = {}
        self._held: dict[str, set[bytes]] = {}
        self._in_turn = asyncio.Lock()
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._own = Outage(window_seconds=limits.retry_window_seconds)
        self._help_until = 0.0
        for priority in LANES:
            metrics.queue_pairs.labels(priority).set_function(partial(self._count, priority))

    @property
    def answers_live_elsewhere(self) -> bool:
        """See `Queue.answers_live_elsewhere`: a Cluster's buckets are on all nodes."""
        return self._scripts.on_cluster

    @property
    def held(self) -> list[str]:
        """The ids of the claims in work here."""
        return list(self._held)

    def noted(self) -> Noted:
        """Return what is known now of each pair for which somebody here waits."""
        return {digest: (asked, asked.turns, asked.deadline) for digest, asked in self._asked.items()}

    def unchanged(self, noted: Noted) -> set[bytes]:
        """Return the pairs of which all is as it was noted: not left and asked again, not joined since."""
        return {
            digest
            for digest, (asked, turns, deadline) in noted.items()
            if self._asked.get(digest) is asked and asked.turns is turns and asked.deadline == deadline
        }

    async def enqueue(self, pairs: Sequence[Pair], asker: Asker) -> Enqueued:
        """See `Queue.enqueue`."""
        added = self.note(pairs, asker)
        token = asker.request or self._new_id()
        ended: dict[bytes, Outcome] = {}
        queued: set[bytes] = set()
        done, size_bytes = 0, sum(pair.size_bytes for pair in pairs)
        look_after: list[float] = []
        try:
            for chunk in _parts(pairs):
                size_bytes -= sum(pair.size_bytes for pair in chunk)
                following = (len(pairs) - done - len(chunk), size_bytes)
                states, errors, seconds = await self._enqueue(chunk, asker, token, following, polling=False)
                self._sort(chunk, states, errors, ended, queued)
                self.join(chunk, asker)
                look_after.append(seconds)
                done += len(chunk)
                if not seconds and done >= self._limits.batch_pairs:
                    self._changed.set()  # what follows may take seconds
        except (QueueFull, Unavailable):  # whoever else asked for the same pairs may still wait
            mine = [digest for digest in added if digest in self._asked and not self._asked[digest].shared]
            joined = {pair.digest for pair in pairs[:done]}  # those before the first new one
            for digest in mine:
                if digest not in joined:
                    del self._asked[digest]
            await self.leave([digest for digest in mine if digest in joined])
            raise
        except BaseException:  # of what may have been queued all the same
            self._changed.set()
            raise
        self.learn(ended, new=added)
        if look_after:
            self._look_after(min(look_after))
        return Enqueued(ended, frozenset(queued))

    def learn(self, ended: Mapping[bytes, Outcome], *, new: Collection[bytes]) -> None:
        """These had ended already, as the request is told that asked; so is whoever asked before or since."""
        alone = set(new)
        for digest, outcome in ended.items():
            asked = self._asked.pop(digest, None)
            if asked is not None and (asked.shared or digest not in alone):
                self._settle(digest, outcome)

    def note(self, pairs: Sequence[Pair], asker: Asker) -> list[bytes]:
        """Somebody here waits for these pairs; those that nobody did before.

        Pairs that somebody did are in this asker's turn too once that is admitted: see `join`.
        """
        added = []
        turns = (self._turn(asker),)
        for pair in pairs:
            known = self._asked.get(pair.digest)
            if known is None:
                added.append(pair.digest)
                self._asked[pair.digest] = WaitingPair(pair, turns, asker.deadline, asker.trace)
            else:
                known.shared = True
                known.deadline = max(known.deadline, asker.deadline)
        return added

    def join(self, pairs: Sequence[Pair], asker: Asker) -> None:
        """The asker was admitted: from now on its pairs wait with its priority, if that is the better one."""
        turn = self._turn(asker)
        for pair in pairs:
            asked = self._asked.get(pair.digest)
            if asked is not None:
                asked.join(turn)

    def _turn(self, asker: Asker) -> Turn:
        quota = self._quota_of(asker)
        return Turn(None if quota is None else quota.account, asker.caller, asker.priority)

    def _quota_of(self, asker: Asker) -> Quota | None:
        return None if asker.priority == "refresh" else self._quotas().of(asker.caller)

    async def ask_again(self, *, but: Collection[bytes] = ()) -> None:
        """Enqueue once more all that somebody here waits for: heals lost messages and a lost queue."""
        by_asker: dict[tuple[str, str, bytes], list[WaitingPair]] = {}
        for digest, asked in self._asked.items():
            for turn in () if digest in but else asked.turns:
                by_asker.setdefault((turn.caller, turn.priority, asked.trace), []).append(asked)
        together: list[tuple[Sequence[Pair], Asker]] = []  # callers may be many, with few pairs each
        size = 0
        for (caller, priority, trace), group in by_asker.items():
            asker = Asker(caller, priority, max(asked.deadline for asked in group), trace)
            for chunk in _parts([asked.pair for asked in group]):
                together.append((chunk, asker))
                size += sum(_weight(pair.size_bytes) for pair in chunk)
                if size >= _CHUNK_PAIRS:
                    await self._ask_chunks_again(together)
                    together, size = [], 0
        await self._ask_chunks_again(together)
        self._changed.set()

    async def _ask_chunks_again(self, chunks: Iterable[tuple[Sequence[Pair], Asker]]) -> None:
        asking = (self._ask_chunk_again(pairs, asker) for pairs, asker in chunks)
        for failed in await asyncio.gather(*asking, return_exceptions=True):
            if failed is not None:
                raise failed

    async def _ask_chunk_again(self, chunk: Sequence[Pair], asker: Asker) -> None:
        pairs = [pair for pair in chunk if pair.digest in self._asked]
        states, errors, _ = await self._enqueue(pairs, asker, self._new_id(), (0, 0), polling=True)
        ended: dict[bytes, Outcome] = {}
        self._sort(pairs, states, errors, ended, set())
        self.end({digest: outcome for digest, outcome in ended.items() if digest in self._asked})
        await self._tell_gone(
            [pair.digest for pair in pairs if pair.digest not in ended]
        )  # while it was asked

    async def leave(self, digests: Sequence[bytes], *, tell: bool = True) -> None:
        """See `Queue.leave`."""
        gone = [digest for digest in digests if self._asked.pop(digest, None) is not None]
        for chunk in _chunks(gone if tell else []):
            await self._tell_gone(chunk)

    async def _tell_gone(self, digests: Sequence[bytes]) -> None:
        if all(digest in self._asked for digest in digests):
            return
        async with self._in_turn:
            gone = [
                digest for digest in digests if digest not in self._asked
            ]  # nor asked for again meanwhile
            if gone:
                await self._scripts.run("leave", [self.replica, b"".join(gone), int(not self._asked)])

    def waiting(self) -> list[tuple[Pair, Asker]]:
        """Return all pairs that wait here, once for each turn, but those in a call of this replica's."""
        in_flight = set().union(*self._held.values())
        return [
            (asked.pair, asker)
            for digest, asked in self._asked.items()
            if digest not in in_flight
            for asker in asked.askers()
        ]

    def ended_alone(self, claim: Claim, outcomes: Mapping[bytes, Outcome]) -> None:
        """Pairs of a claim ended, and Redis cannot be told yet."""
        self.end(outcomes)
        self._let_go(claim, outcomes)

    def release(self, claim: Claim) -> list[tuple[Pair, Asker]]:
        """The call is over, unanswered, and Redis cannot be told: what somebody here still waits for."""
        self._held.pop(claim.id, None)
        claimed = {pair.digest for pair in claim.pairs}
        return [(pair, asker) for pair, asker in self.waiting() if pair.digest in claimed]

    def end(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Pairs have ended: tell whoever waits here."""
        for digest, outcome in outcomes.items():
            self._end(digest, outcome)

    def end_all(self, error: PairError) -> None:
        """End all that somebody here waits for: the process is about to end."""
        self.end(dict.fromkeys(self._asked, error))

    async def publish(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Tell all replicas how pairs ended that were never claimed, or whose claim is long over."""
        await self._publish("", outcomes, inferred=False)

    async def claim(self) -> Claim | NotYet:
        """See `Queue.claim`. Only a replica where somebody waits claims: others would only be in the way.

        But for those whose own calls fail.
        """
        now = time.monotonic()
        if not self._asked and now >= self._help_until:
            return NotYet(math.inf)
        if now < self._not_before:
            return NotYet(self._not_before - now)
        limits, claim_id, help_until = self._limits, self._new_id(), self._help_until
        reply = await self._scripts.run("claim", [
            self.replica, claim_id, limits.pairs_per_second * PACE, limits.calls_per_second * PACE,
            limits.batch_pairs, limits.batch_bytes, self._linger_ms, self._lease_ms,
            _AHEAD_MS, self.run, self._failed_ago_ms(now),
        ])  # fmt: skip
        if reply[0] == b"aside":
            self._not_before = now + reply[1] / 1000
            return NotYet(reply[1] / 1000)
        if reply[0] == b"wait":
            if reply[1] < 0 and self._help_until == help_until:  # nothing waits, nor was published since
                self._help_until = 0.0
            return NotYet(math.inf if reply[1] < 0 else max(reply[1] / 1000, 0.001))
        until_send_ms, until_slot_ms, packed, traces, request = reply[1:6]
        pairs = list(self._read(unpack(packed)))
        # Redis's `now` lies somewhere between request and reply; two neighbours err alike.
        redis_now = now + (time.monotonic() - now) / 2
        send_at = redis_now + until_send_ms / 1000 if until_send_ms else now
        slot_at = redis_now + until_slot_ms / 1000
        claim = Claim(claim_id, pairs, send_at, slot_at, traces, request.decode("ascii", "replace"))
        self._held[claim_id] = {pair.digest for pair in pairs}
        return claim

    def _failed_ago_ms(self, now: float) -> int:
        """Return how long ago this replica's last call failed, -1 if it did not or others' would have too."""
        if not self._own.steps_aside:
            return -1
        aside_seconds = _ASIDE_SECONDS if self._own.failures > 1 else _FIRST_ASIDE_SECONDS
        failed_ago = now - self._own.failed_at
        return round(failed_ago * 1000) if failed_ago < aside_seconds else -1

    def _read(self, batch: Iterable[tuple[bytes, bytes, bytes, float]]) -> Iterator[Pair]:
        """The pairs of a batch that can be read; the others nobody here could answer."""
        for digest, company, title, waited_ms in batch:
            try:
                pair = Pair(digest, company.decode(), title.decode())
            except UnicodeDecodeError:
                self._metrics.store_garbage.inc()
                continue
            self._metrics.slot_wait.observe(waited_ms / 1000)
            yield pair

    async def late(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        moved: int = await self._scripts.run("late", [claim.id, math.ceil(seconds * 1000)])
        return moved == 1

    async def put_back(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        await self._over(claim, "put_back", [])

    async def fulfil(self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True) -> None:
        """See `Queue.fulfil`."""
        self.end(outcomes)  # whoever waits here need not wait for Redis
        if inferred:
            self._own.end()
        try:
            await self._publish(claim.id, outcomes, inferred=inferred)
        finally:
            self._let_go(claim, outcomes)

    async def fail(
        self, claim: Claim, error: Unavailable, *, retry_after_seconds: float | None = None,
        suspicious: bool = False, unsent: bool = False,
    ) -> None:  # fmt: skip
        """See `Queue.fail`. This replica's own failures defer its own claims; the fleet counts its own."""
        now, limits = time.monotonic(), self._limits
        spread = random.uniform(*BACKOFF_SPREAD)  # noqa: S311
        self._own.fail(
            error, sent_at=claim.send_at, now=now, pushback_seconds=retry_after_seconds,
            suspicious=suspicious, spread=spread,
        )  # fmt: skip
        again = self._own.not_before
        if (
            self._own.steps_aside and limits.calls_per_second and not unsent
        ):  # the limit allows no call before
            again = max(again, claim.slot_at + 1 / (limits.calls_per_second * PACE))
        self._not_before = again + _DEFER_SECONDS
        pushback_ms = -1 if retry_after_seconds is None else round(retry_after_seconds * 1000)
        arguments = [
            pushback_ms, pack(pack_error(error)), round(limits.retry_window_seconds * 1000),
            round(spread * MIN_BACKOFF_SECONDS * 1000), round(MAX_BACKOFF_SECONDS * 1000),
            round(MAX_BREAKDOWN_BACKOFF_SECONDS * 1000), int(suspicious), int(unsent), MAX_FAILED_BATCHES,
            MAX_BREAKDOWNS, MAX_REFUSALS,
        ]  # fmt: skip
        await self._over(claim, "fail", arguments)

    async def refuse(self, claim: Claim, error: PairError, named: Mapping[bytes, PairError]) -> None:
        """See `Queue.refuse`."""
        reasons = [[digest, pack_error(reason)] for digest, reason in named.items()]
        self._own.end()
        await self._over(
            claim, "refuse", [pack(pack_error(error)), pack(reasons), MAX_REFUSALS, self.replica]
        )

    async def overview(self, *, minutes: int) -> Overview:
        """See `ProxyQueue.overview`."""
        arguments = [minutes, MAX_REPORTS, MAX_REPORT_BYTES]
        return read_overview(await self._scripts.run("overview", arguments))

    async def changed(self) -> None:
        """See `Queue.changed`."""
        await self._changed.wait()
        self._changed.clear()

    def published(
        self, levels: bytes, errors: Sequence[tuple[bytes, Any]], all_error: Any, pause: Any = None
    ) -> None:
        """Take in what some replica published.

        `pause` is how long nobody calls a model target, in ms, and why. Another target is no concern of this
        replica's: it may send the pairs itself.
        """
        if pause and pause[2] == self._scripts.model.encode():
            milliseconds, error, _ = pause
            seconds = float(milliseconds) / 1000
            if not 0 <= seconds <= _MAX_PATIENCE_SECONDS:
                raise ValueError(milliseconds)
            self._give_up(time.monotonic() + seconds, self._error(error))
        if not levels and not errors and not all_error:
            # The call that another replica cannot make may have taken a slot: the next one is as far away.
            self._help_until = time.monotonic() + self._limits.slot_seconds + _HELP_SECONDS
            self._changed.set()
        for at in range(0, len(levels) - _DIGEST_BYTES, _LEVEL_BYTES):
            level = levels[at + _DIGEST_BYTES]
            if level in _LEVELS:
                self._end(levels[at : at + _DIGEST_BYTES], level)
        for digest, error in errors:
            self._end(digest, self._error(error))
        if all_error:
            self.end_all(self._error(all_error))
        if self._asked:
            # A batch's answers come in parts: until the last is here, all would ask for a call in vain.
            rest_seconds = _PART_SECONDS if levels or errors else 0.0
            asyncio.get_running_loop().call_later(rest_seconds, self._changed.set)

    def _look_after(self, seconds: float) -> None:
        """Ask for a call now (0), or when whoever queued what was only joined here should have had one."""
        if not seconds:
            self._changed.set()
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds + _OTHERS_SECONDS
        if self._look is not None:
            if self._look.when() <= due:
                return
            self._look.cancel()
        self._look = loop.call_at(due, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        self._changed.set()

    def _let_go(self, claim: Claim, ended: Iterable[bytes]) -> None:
        left = self._held.get(claim.id)
        if left is not None:
            left.difference_update(ended)
            if not left:
                del self._held[claim.id]

    def _count(self, priority: str) -> int:
        return sum(asked.priority == priority for asked in self._asked.values())

    async def _publish(self, claim_id: str, outcomes: Mapping[bytes, Outcome], *, inferred: bool) -> None:
        for chunk in _chunks(list(outcomes.items())):
            levels = b"".join(key + bytes((level,)) for key, level in chunk if isinstance(level, int))
            errors = [[key, pack_error(error)] for key, error in chunk if isinstance(error, PairError)]
            await self._scripts.run("fulfil", [
                claim_id, levels, pack(errors), round(NONSENSE_SECONDS * 1000), int(inferred), self.replica,
            ])  # fmt: skip

    def _end(self, digest: bytes, outcome: Outcome) -> None:
        self._asked.pop(digest, None)
        self._settle(digest, outcome)

    async def _over(self, claim: Claim, script: str, arguments: Sequence[Any]) -> None:
        """The last word on a claim. It stays listed until that is heard, so that it is not given away."""
        try:
            await self._scripts.run(script, [claim.id, *arguments])
        finally:
            self._held.pop(claim.id, None)
            self._changed.set()

    async def _enqueue(
        self, pairs: Sequence[Pair], asker: Asker, token: str, following: tuple[int, int], *, polling: bool
    ) -> tuple[bytes, list[Any], float]:
        """One byte a pair, the errors of those that failed, and when to see to a call (see `enqueue.lua`)."""
        if not pairs:
            return b"", [], 0.0
        patience_seconds = max(0.0, asker.deadline - asyncio.get_running_loop().time())
        patience_ms = round(min(patience_seconds, _MAX_PATIENCE_SECONDS) * 1000)
        request = [
            asker.caller, asker.priority, patience_ms, *following, token, int(polling),
            [[pair.digest, pair.company, pair.title, pair.size_bytes] for pair in pairs], asker.trace,
        ]  # fmt: skip
        quota = self._quota_of(asker)
        if quota is not None:
            request.append([quota.account, quota.pairs_per_second * PACE, quota.queued_pairs])
        reply = await self._together.ride(request)
        if reply[0] == b"ok":
            return reply[1], reply[2], reply[3] / 1000
        wait_seconds = reply[1] / 1000
        if reply[0] == b"down":
            raise self._down(reply[2], wait_seconds)
        raise _refused(
            reply,
            quota,
            limits=self._limits,
            pairs=len(pairs) + following[0],
            patience_seconds=patience_seconds,
        )

    async def _enqueue_together(self, requests: Sequence[list[Any]]) -> Sequence[Any]:
        limits = self._limits
        arguments = [
            self.replica, limits.max_pairs, limits.max_bytes, limits.batch_pairs,
            round(limits.retry_window_seconds * 1000), pack(requests),
        ]  # fmt: skip
        async with self._in_turn:
            replies = unpack(await self._scripts.run("enqueue", arguments))
        if len(replies) != len(requests):
            message = f"the queue answered {len(replies)} of {len(requests)} requests"
            raise StoreError(message)
        return replies  # type: ignore[no-any-return]

    def _sort(
        self, pairs: Sequence[Pair], states: bytes, errors: list[Any], ended: dict[bytes, Outcome],
        queued: set[bytes],
    ) -> None:  # fmt: skip
        failed = iter(errors)
        for pair, state in zip(pairs, states, strict=True):
            if state == _FAILED:
                ended[pair.digest] = self._error(next(failed, None))
            elif state in _LEVELS:
                ended[pair.digest] = state
            elif state == _QUEUED:
                queued.add(pair.digest)

    def _down(self, reason: Any, wait_seconds: float) -> Unavailable:
        """Return the error of a request that is refused while the model is down: why its last call failed."""
        error = self._error(reason) if reason else None
        if not isinstance(error, Unavailable):
            error = Unavailable("the model is down", 0.0)
        error.retry_after_seconds = max(_MIN_PUSHBACK_SECONDS, wait_seconds)
        return error

    def _error(self, packed: Any) -> PairError:
        """Return the error that some replica packed. What cannot be read is counted, and may be retried."""
        try:
            return unpack_error(packed)
        except StoreError as error:
            self._metrics.store_garbage.inc()
            return Unavailable(f"the pair failed, and {error}", _UNREADABLE_RETRY_SECONDS)

    def _new_id(self) -> str:
        return f"{self.replica}.{next(self._ids)}"


def _refused(
    reply: Any, quota: Quota | None, *, limits: QueueLimits, pairs: int, patience_seconds: float
) -> QueueFull:
    why, wait_seconds = reply[0], reply[1] / 1000
    if why == b"full":
        held, unit = reply[2].decode().split(" ")
        most = limits.max_pairs if unit == "pairs" else limits.max_bytes
        return rejections.full(int(held), unit, most=most, wait_seconds=wait_seconds)
    if why == b"queued" and quota is not None:
        return rejections.over_queued_pairs(
            quota, waiting=int(reply[2]), pairs=pairs, wait_seconds=wait_seconds
        )
    if why == b"slow" and quota is not None:
        return rejections.over_pairs_per_second(
            quota, wait_seconds=wait_seconds, left_seconds=patience_seconds
        )
    return rejections.late(wait_seconds=wait_seconds, left_seconds=patience_seconds)


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _CHUNK_PAIRS):
        yield items[start : start + _CHUNK_PAIRS]


def _parts(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """The pairs in chunks whose texts are as bounded as their number."""
    start, size = 0, 0
    for at, pair in enumerate(pairs):
        weight = _weight(pair.size_bytes)
        if at > start and size + weight > _CHUNK_PAIRS:
            yield pairs[start:at]
            start, size = at, 0
        size += weight
    if pairs:
        yield pairs[start:]


def _weight(size_bytes: int) -> int:
    return 1 + size_bytes // _PAIR_BYTES
