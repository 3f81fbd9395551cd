"""The miss queue of one process: for `memory:`, for one replica, and for a replica that lost Redis."""

import asyncio
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.cache_proxy.errors import PairError, QueueFull
from services.cache_proxy.metrics import PRIORITIES, ProxyMetrics
from services.cache_proxy.queue import Asker, Claim, Enqueued, NotYet, Outcome, Pair, Settle
from services.cache_proxy.queue.gcra import PACE, Gcra
from services.cache_proxy.queue.recent import Recent
from services.cache_proxy.queue.suspects import Suspects

_MAX_ATTEMPTS = 4  # calls that one pair may see fail; as many in a row mean that the model is down
_MAX_REFUSALS = 32  # refused batches that one pair may have been in before it is taken for the bad one
_BULK_SHARE = 10  # a tenth of a batch is kept for bulk
_PUSHBACK_SECONDS = (1.0, 60.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueLimits:
    """Bounds of the queue and of the calls; a rate of 0 means no limit."""

    batch_pairs: int
    batch_bytes: int
    pairs_per_second: float
    calls_per_second: float
    linger_seconds: float
    max_pairs: int
    max_bytes: int


@dataclass(slots=True, eq=False)
class _Entry:
    pair: Pair
    priority: str
    enqueued_at: float
    attempts: int = 0
    refusals: int = 0


class LocalQueue:
    """State, touched only from the event loop and never across an await.

    `_entries` has every pair that has not ended: it waits in one of `_lanes` (by priority, first in first
    out), is among the `_suspects`, or is in flight in a claim. Who ends it removes it *by identity*, so a
    late answer never ends a pair that was asked for anew. `_recent` closes the race between a look-up
    that missed and the answer that landed before the pair was enqueued.
    """

    def __init__(self, limits: QueueLimits, *, settle: Settle, metrics: ProxyMetrics) -> None:
        self._limits = limits
        self._settle = settle
        self._metrics = metrics
        self._entries: dict[bytes, _Entry] = {}
        self._lanes: dict[str, OrderedDict[bytes, _Entry]] = {name: OrderedDict() for name in PRIORITIES}
        self._recent = Recent()
        self._suspects: Suspects[_Entry] = Suspects()
        self._waiting_bytes = self._held_bytes = 0
        now = _now()
        self._pairs = Gcra.begin(rate_per_second=limits.pairs_per_second, burst=limits.batch_pairs, now=now)
        self._calls = Gcra.begin(rate_per_second=limits.calls_per_second, burst=1, now=now)
        self._last_claim: Claim | None = None  # the only one whose slot may be refunded
        self._not_before = now
        self._failures_in_a_row = 0
        self._changed = asyncio.Event()
        self._show_metrics()

    async def enqueue(self, pairs: Sequence[Pair], asker: Asker) -> Enqueued:
        """See `Queue.enqueue`."""
        now = _now()
        ended: dict[bytes, Outcome] = {}
        fresh: dict[bytes, Pair] = {}
        for pair in pairs:
            outcome = self._recent.get(pair.digest, now=now)
            if outcome is not None:
                ended[pair.digest] = outcome
            elif pair.digest not in self._entries:
                fresh[pair.digest] = pair
        if fresh:
            self._admit(fresh.values(), asker, now)
        for pair in pairs:
            entry = self._entries.get(pair.digest)
            if entry is not None and _better(asker.priority, entry.priority):
                self._promote(entry, asker.priority)
        for pair in fresh.values():
            entry = _Entry(pair, asker.priority, now)
            self._entries[pair.digest] = entry
            self._held_bytes += pair.size_bytes
            self._wait(entry)
        if fresh:
            self._changed.set()
        return Enqueued(ended, frozenset(fresh))

    async def leave(self, digests: Sequence[bytes]) -> None:
        """See `Queue.leave`."""
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is not None and (self._unwait(entry) or self._suspects.drop(entry)):
                self._forget(entry)

    async def claim(self) -> Claim | NotYet:
        """See `Queue.claim`."""
        now = _now()
        waiting = sum(map(len, self._lanes.values()))
        probe = self._suspects.due(others_wait=waiting > 0)
        count = len(probe) if probe else min(waiting, self._limits.batch_pairs)
        if not count:
            return NotYet(math.inf)
        ready_at = now if probe or self._full(waiting) else self._oldest_at() + self._limits.linger_seconds
        wait_seconds = max(
            ready_at - now,
            self._not_before - now,
            self._pairs.wait_seconds(count, now=now),
            self._calls.wait_seconds(1, now=now),
        )
        if wait_seconds > 0:
            return NotYet(wait_seconds)
        entries = probe or self._compose()
        if not probe:
            for entry in entries:
                self._unwait(entry)
        self._pairs.spend(len(entries), now=now)
        self._calls.spend(1, now=now)
        for entry in entries:
            self._metrics.slot_wait.observe(now - entry.enqueued_at)
        claim = Claim([entry.pair for entry in entries], now)
        self._suspects.sent(claim, probe)
        self._last_claim = claim
        return claim

    async def put_back(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        if claim is self._last_claim:  # the limits are still what this claim made them
            self._pairs.refund(len(claim.pairs))
            self._calls.refund(1)
            self._last_claim = None
        entries = self._held(claim)
        if not self._suspects.undo(claim, entries):
            self._wait_again(entries)
        self._changed.set()

    async def fulfil(self, claim: Claim, outcomes: Mapping[bytes, Outcome]) -> None:
        """See `Queue.fulfil`."""
        self._failures_in_a_row = 0
        for entry in self._held(claim):
            outcome = outcomes.get(entry.pair.digest)
            if outcome is not None:
                self._end(entry, outcome)
        if not self._held(claim):
            self._suspects.cleared(claim)
            self._changed.set()

    async def fail(self, claim: Claim, error: PairError, *, retry_after_seconds: float) -> None:
        """See `Queue.fail`."""
        self._not_before = max(self._not_before, _now() + retry_after_seconds)
        self._failures_in_a_row += 1
        down = self._failures_in_a_row >= _MAX_ATTEMPTS
        over: list[_Entry] = []
        again: list[_Entry] = []
        for entry in self._held(claim):
            entry.attempts += 1
            (over if down or entry.attempts >= _MAX_ATTEMPTS else again).append(entry)
        if not self._suspects.undo(claim, again):
            self._wait_again(again)
        if down:  # whoever waits would wait for nothing
            over += [entry for lane in self._lanes.values() for entry in lane.values()]
            over += self._suspects.clear()
        for entry in over:
            self._unwait(entry)
            self._end(entry, error, remember=False)
        self._changed.set()

    async def refuse(self, claim: Claim, error: PairError, named: Mapping[bytes, PairError]) -> None:
        """See `Queue.refuse`."""
        self._failures_in_a_row = 0
        innocent, suspected = [], []
        entries = self._held(claim)
        for entry in entries:
            entry.refusals += 1
            if named or len(entries) == 1 or entry.refusals >= _MAX_REFUSALS:
                reason = named.get(entry.pair.digest, None if named else error)
                if reason is None:
                    innocent.append(entry)
                else:
                    self._end(entry, reason)
            else:
                suspected.append(entry)
        self._wait_again(innocent + self._suspects.refused(claim, suspected))

    async def changed(self) -> None:
        """See `Queue.changed`."""
        await self._changed.wait()
        self._changed.clear()

    def end_all(self, error: PairError) -> None:
        """End every pair, also those in flight, with `error`: the process is about to end."""
        self._suspects.clear()
        for entry in list(self._entries.values()):
            self._unwait(entry)
            self._end(entry, error, remember=False)

    def expected_wait_seconds(self, pairs: int, *, priority: str) -> float:
        """How long until so many more pairs of this priority would all have been sent."""
        now = _now()
        ahead = len(self._lanes["interactive"]) + (len(self._lanes["bulk"]) if priority == "bulk" else 0)
        slots = math.ceil((ahead + pairs) / self._limits.batch_pairs)
        first = max(
            self._not_before - now,
            self._pairs.wait_seconds(min(pairs, self._limits.batch_pairs), now=now),
            self._calls.wait_seconds(1, now=now),
        )
        return max(0.0, first) + (slots - 1) * self._slot_seconds()

    def _slot_seconds(self) -> float:
        per_pair, per_call = self._limits.pairs_per_second, self._limits.calls_per_second
        return (
            max(self._limits.batch_pairs / per_pair if per_pair else 0.0, 1 / per_call if per_call else 0.0)
            / PACE
        )

    def _admit(self, pairs: Iterable[Pair], asker: Asker, now: float) -> None:
        pairs = list(pairs)
        wait_seconds = self.expected_wait_seconds(len(pairs), priority=asker.priority)
        size_bytes = sum(pair.size_bytes for pair in pairs)
        least, most = _PUSHBACK_SECONDS
        if len(self._entries) + len(pairs) > self._limits.max_pairs:
            message = (
                f"the queue is full: {len(self._entries)} pairs wait, the limit is {self._limits.max_pairs}"
            )
            raise QueueFull(message, min(most, max(least, wait_seconds)))
        if self._held_bytes + size_bytes > self._limits.max_bytes:
            message = (
                f"the queue is full: {self._held_bytes} bytes wait, the limit is {self._limits.max_bytes}"
            )
            raise QueueFull(message, min(most, max(least, wait_seconds)))
        left_seconds = asker.deadline - now
        if wait_seconds > left_seconds:
            message = (
                f"{len(pairs)} pairs would wait {wait_seconds:.1f} s for the model, "
                f"but the deadline is in {max(0.0, left_seconds):.1f} s"
            )
            raise QueueFull(message, min(most, max(least, wait_seconds - left_seconds)))

    def _compose(self) -> list[_Entry]:
        size, interactive, bulk = self._limits.batch_pairs, self._lanes["interactive"], self._lanes["bulk"]
        for_bulk = min(len(bulk), max(math.ceil(size / _BULK_SHARE), size - len(interactive)))
        if size == 1 and interactive:
            for_bulk = 0
        chosen: list[_Entry] = []
        size_bytes = 0
        for entry in itertools.chain(
            itertools.islice(interactive.values(), size - for_bulk), itertools.islice(bulk.values(), for_bulk)
        ):
            size_bytes += entry.pair.size_bytes
            if chosen and size_bytes > self._limits.batch_bytes:
                break
            chosen.append(entry)
        return chosen

    def _full(self, waiting: int) -> bool:
        return waiting >= self._limits.batch_pairs or self._waiting_bytes >= self._limits.batch_bytes

    def _oldest_at(self) -> float:
        return min(next(iter(lane.values())).enqueued_at for lane in self._lanes.values() if lane)

    def _wait(self, entry: _Entry, *, front: bool = False) -> None:
        lane = self._lanes[entry.priority]
        lane[entry.pair.digest] = entry
        lane.move_to_end(entry.pair.digest, last=not front)
        self._waiting_bytes += entry.pair.size_bytes

    def _unwait(self, entry: _Entry) -> bool:
        lane = self._lanes[entry.priority]
        if lane.get(entry.pair.digest) is not entry:
            return False
        del lane[entry.pair.digest]
        self._waiting_bytes -= entry.pair.size_bytes
        return True

    def _wait_again(self, entries: Iterable[_Entry]) -> None:
        for entry in reversed([entry for entry in entries if self._is_live(entry)]):
            self._wait(entry, front=True)
        self._changed.set()

    def _promote(self, entry: _Entry, priority: str) -> None:
        waits = self._unwait(entry)
        entry.priority = priority
        if waits:
            self._wait(entry)

    def _held(self, claim: Claim) -> list[_Entry]:
        """The claim's pairs that have not ended meanwhile."""
        found = (self._entries.get(pair.digest) for pair in claim.pairs)
        return [entry for entry, pair in zip(found, claim.pairs, strict=True) if entry and entry.pair is pair]

    def _is_live(self, entry: _Entry) -> bool:
        return self._entries.get(entry.pair.digest) is entry

    def _end(self, entry: _Entry, outcome: Outcome, *, remember: bool = True) -> None:
        if self._is_live(entry):
            self._forget(entry)
            if remember:
                self._recent.add(entry.pair.digest, outcome, now=_now())
            self._settle(entry.pair.digest, outcome)

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.pair.digest]
        self._held_bytes -= entry.pair.size_bytes

    def _show_metrics(self) -> None:
        for name, lane in self._lanes.items():
            self._metrics.queue_pairs.labels(name).set_function(lane.__len__)
            self._metrics.queue_global_pairs.labels(name).set_function(lane.__len__)
        self._metrics.queue_oldest.set_function(
            lambda: _now() - self._oldest_at() if any(self._lanes.values()) else 0.0
        )
        self._metrics.live_replicas.set(1)


def _better(priority: str, than: str) -> bool:
    return PRIORITIES.index(priority) < PRIORITIES.index(than)


def _now() -> float:
    return asyncio.get_running_loop().time()
