"""The miss queue of one process: for `memory:`, for one replica, and for a replica that lost Redis."""

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter

from services.cache_proxy.errors import PairError, QueueFull
from services.cache_proxy.metrics import LANES, PRIORITIES, ProxyMetrics
from services.cache_proxy.queue import (
    MAX_ATTEMPTS,
    MAX_BREAKDOWNS,
    MAX_REFUSALS,
    Asker,
    Claim,
    Enqueued,
    NotYet,
    Outcome,
    Pair,
    QueueLimits,
    Settle,
    pushback_seconds,
)
from services.cache_proxy.queue.fair import Entry
from services.cache_proxy.queue.lanes import Lanes, is_better
from services.cache_proxy.queue.limiter import CallLimiter
from services.cache_proxy.queue.overview import Overview
from services.cache_proxy.queue.recent import Recent
from services.cache_proxy.queue.suspects import Suspects

_LEAD_SECONDS = 0.015  # so long before its slot a batch is claimed, to be ready when that begins


class LocalQueue:
    """State, touched only from the event loop and never across an await.

    `_entries` has every pair that has not ended: it waits in `_lanes`, is among the `_suspects`, or is in
    flight in a claim. Who ends it removes it *by identity*, so a late answer never ends a pair that was
    asked for anew. `_recent` closes the race between a look-up that missed and the answer that landed
    before the pair was enqueued.
    """

    def __init__(
        self, limits: QueueLimits, *, limiter: CallLimiter, settle: Settle, metrics: ProxyMetrics
    ) -> None:
        self._limits = limits
        self._settle = settle
        self._metrics = metrics
        self._entries: dict[bytes, Entry] = {}
        self._held_bytes = 0  # of all entries, waiting or in flight
        self._lanes = Lanes()
        self._suspects: Suspects[Entry] = Suspects(attrgetter("caller"))
        self._recent = Recent()
        self._limiter = limiter
        self._last_claim: Claim | None = None  # the only one whose slot may be refunded
        self._failures_in_a_row = 0
        self._failed_at = -math.inf  # when the last of them was noticed
        self._changed = asyncio.Event()
        self.last_loss: tuple[str, float] | None = None  # it shares nothing

    @property
    def lost(self) -> bool:
        """See `ProxyQueue.lost`: it shares nothing."""
        return False

    @property
    def answers_live_elsewhere(self) -> bool:
        """See `Queue.answers_live_elsewhere`."""
        return False

    async def enqueue(self, pairs: Sequence[Pair], asker: Asker) -> Enqueued:
        """See `Queue.enqueue`."""
        now = _now()
        ended: dict[bytes, Outcome] = {}
        fresh: dict[bytes, Pair] = {}
        joined: list[Entry] = []
        for pair in pairs:
            entry = self._entries.get(pair.digest)
            outcome = None if entry else self._recent.get(pair.digest, now=now)
            if entry is not None:
                joined.append(entry)
            elif outcome is not None:
                ended[pair.digest] = outcome
            else:
                fresh[pair.digest] = pair
        self._admit(list(fresh.values()), joined, asker, now)
        for entry in joined:
            entry.wanted = True
            entry.traced(asker.trace)
            self._lanes.promote(entry, asker.priority, asker.caller)
        for pair in fresh.values():
            self._add(pair, asker, now)
        if fresh:
            self._changed.set()
        return Enqueued(ended, frozenset(fresh))

    async def leave(self, digests: Sequence[bytes]) -> None:
        """See `Queue.leave`."""
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is None:
                continue
            entry.wanted = False
            if self._lanes.discard(entry) or self._suspects.drop(entry):
                self._forget(entry)

    async def claim(self) -> Claim | NotYet:
        """See `Queue.claim`."""
        now = _now()
        probe = self._suspects.due(others_wait=bool(self._lanes))
        count = len(probe) or min(len(self._lanes), self._limits.batch_pairs)
        if not count:
            return NotYet(math.inf)
        linger_seconds = 0.0 if probe or self._full() else self._limits.linger_seconds
        company_comes_until = self._lanes.oldest_at() + linger_seconds if linger_seconds else now
        slot_at = now + self._limiter.wait_seconds(count, now=now)
        wait_seconds = max(company_comes_until, slot_at - _LEAD_SECONDS) - now
        if wait_seconds > 0:
            return NotYet(wait_seconds)
        entries = probe or self._lanes.take(
            batch_pairs=self._limits.batch_pairs, batch_bytes=self._limits.batch_bytes
        )
        for entry in entries:
            self._metrics.slot_wait.observe(now - entry.enqueued_at)
        self._limiter.spend(len(entries), now=slot_at)
        traces = [trace for entry in entries for trace in entry.traces]
        claim = Claim("", [entry.pair for entry in entries], slot_at, slot_at, traces)
        self._suspects.sent(claim, probe)
        self._last_claim = claim
        return claim

    async def late(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        return claim is self._last_claim and self._limiter.delay(seconds)

    async def put_back(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        if claim is self._last_claim:  # the limits are still what this claim made them
            self._limiter.refund(len(claim.pairs))
            self._last_claim = None
        self._not_judged(claim, self._wanted(self._held(claim)))

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

    async def fail(
        self, claim: Claim, error: PairError, *, retry_after_seconds: float, suspicious: bool = False
    ) -> None:
        """See `Queue.fail`."""
        now = _now()
        self._limiter.hold_until(now + retry_after_seconds)
        if claim.send_at >= self._failed_at:  # calls that were under way together fail together: once
            self._failures_in_a_row += 1
            self._failed_at = now
        down = self._failures_in_a_row >= (MAX_BREAKDOWNS if suspicious else MAX_ATTEMPTS)
        held = self._held(claim)
        # It failed before, whole: one of its pairs may be why. Of a lone one that says nothing unless others
        # passed meanwhile.
        telling = len(held) > 1 or self._failures_in_a_row == 1
        if suspicious and not down and telling and all(entry.attempts for entry in held):
            self._suspect(claim, error, {})
            return
        over: list[Entry] = []
        again: list[Entry] = []
        for entry in self._wanted(held):
            entry.attempts += 1
            (over if down or entry.attempts >= MAX_ATTEMPTS else again).append(entry)
        self._not_judged(claim, again)
        if down:  # whoever waits would wait for nothing
            over += self._lanes.entries() + self._suspects.clear()
        for entry in over:
            self._end(entry, error, remember=False)

    async def refuse(self, claim: Claim, error: PairError, named: Mapping[bytes, PairError]) -> None:
        """See `Queue.refuse`."""
        self._failures_in_a_row = 0
        self._suspect(claim, error, named)

    def _suspect(self, claim: Claim, error: PairError, named: Mapping[bytes, PairError]) -> None:
        innocent, suspected = [], []
        entries = self._held(claim)
        for entry in entries:
            entry.refusals += 1
            if named or len(entries) == 1 or entry.refusals >= MAX_REFUSALS:
                reason = named.get(entry.pair.digest, None if named else error)
                if reason is None:
                    innocent.append(entry)
                else:
                    self._end(entry, reason)
            else:
                suspected.append(entry)
        no_longer_suspected = self._suspects.refused(claim, self._wanted(suspected))
        self._wait_again(self._wanted(innocent) + no_longer_suspected)

    async def overview(self, *, minutes: int) -> Overview:  # noqa: ARG002 - it shares no reports
        """See `ProxyQueue.overview`."""
        limits, limiter = self._limits, self._limiter
        next_pairs = min(len(self._lanes) + 1, limits.batch_pairs)
        next_call_seconds = limiter.wait_seconds(next_pairs, now=_now())
        return Overview(
            now_seconds=time.time(),
            waiting={lane: self._lanes.count(lane) for lane in LANES},
            next_call_seconds=next_call_seconds if math.isfinite(next_call_seconds) else None,
            batch_pairs=limits.batch_pairs,
            batch_seconds=limiter.slot_seconds,
            pairs_per_second=limits.pairs_per_second,
            calls_per_second=limits.calls_per_second,
            failures_in_a_row=self._failures_in_a_row,
            live_replicas=1,
            silent_replicas=None,
        )

    async def changed(self) -> None:
        """See `Queue.changed`."""
        await self._changed.wait()
        self._changed.clear()

    def take_over(self, pair: Pair, asker: Asker) -> None:
        """Have a pair wait that another queue had admitted."""
        entry = self._entries.get(pair.digest)
        if entry is None:
            self._add(pair, asker, _now())
        else:
            entry.wanted = True
            entry.traced(asker.trace)
        self._changed.set()

    def withdraw(self) -> set[bytes]:
        """Let another queue have all that is not in flight; the pairs that are."""
        waiting = self._lanes.entries() + self._suspects.clear()
        for entry in waiting:
            self._lanes.discard(entry)
            self._forget(entry)
        return set(self._entries)

    def end_elsewhere(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Pairs were answered by a call that another queue had allowed."""
        for digest, outcome in outcomes.items():
            entry = self._entries.get(digest)
            if entry is not None:
                self._suspects.drop(entry)
                self._end(entry, outcome)

    def discard(self, digest: bytes) -> None:
        """See `ProxyQueue.discard`."""
        self._recent.remove(digest)

    def discard_all(self) -> None:
        """See `ProxyQueue.discard_all`."""
        self._recent.clear()

    def end_all(self, error: PairError) -> None:
        """End every pair, also those in flight, with `error`: the process is about to end."""
        self._suspects.clear()
        for entry in list(self._entries.values()):
            self._end(entry, error, remember=False)

    def _admit(self, pairs: Sequence[Pair], joined: Sequence[Entry], asker: Asker, now: float) -> None:
        limits = self._limits
        wait_seconds = self._wait_seconds(len(pairs), joined, asker, now)
        size_bytes = sum(pair.size_bytes for pair in pairs)
        if pairs and len(self._entries) + len(pairs) > limits.max_pairs:
            reason = f"the queue is full: {len(self._entries)} pairs wait, the limit is {limits.max_pairs}"
            raise QueueFull(reason, pushback_seconds(wait_seconds))
        if pairs and self._held_bytes + size_bytes > limits.max_bytes:
            reason = f"the queue is full: {self._held_bytes} bytes wait, the limit is {limits.max_bytes}"
            raise QueueFull(reason, pushback_seconds(wait_seconds))
        left_seconds = asker.deadline - now
        if wait_seconds > left_seconds:
            reason = (
                f"the pairs would wait {wait_seconds:.1f} s for the model, "
                f"but the deadline is in {max(0.0, left_seconds):.1f} s"
            )
            raise QueueFull(reason, pushback_seconds(wait_seconds - left_seconds))

    def _wait_seconds(self, fresh: int, joined: Sequence[Entry], asker: Asker, now: float) -> float:
        """How long until the last of a request's pairs goes out: of the new ones and those that it promotes,
        which wait in the caller's own turn, and of those that it joins where they are.
        """  # noqa: D205 - one thought
        batch_pairs, lanes = self._limits.batch_pairs, self._lanes
        turn, last = fresh, dict[str, Entry]()
        for entry in joined:
            if not lanes.waits(entry):
                continue
            if is_better(asker.priority, entry.priority):
                turn += 1
            elif entry.priority not in last or entry.start > last[entry.priority].start:
                last[entry.priority] = entry
        calls = [lanes.calls_until(entry, batch_pairs=batch_pairs) for entry in last.values()]
        if turn:
            calls.append(
                lanes.calls_until_new(
                    priority=asker.priority, caller=asker.caller, count=turn, batch_pairs=batch_pairs
                )
            )
        if not calls:
            return 0.0
        first_seconds = self._limiter.wait_seconds(max(1, min(turn, batch_pairs)), now=now)
        return first_seconds + (max(1, *calls) - 1) * self._limiter.slot_seconds

    def _add(self, pair: Pair, asker: Asker, now: float) -> None:
        entry = Entry(pair, asker.priority, asker.caller, now)
        entry.traced(asker.trace)
        self._entries[pair.digest] = entry
        self._held_bytes += pair.size_bytes
        self._lanes.add(entry)

    def _full(self) -> bool:
        return (
            len(self._lanes) >= self._limits.batch_pairs or self._lanes.size_bytes >= self._limits.batch_bytes
        )

    def _not_judged(self, claim: Claim, entries: Sequence[Entry]) -> None:
        if self._suspects.undo(claim, entries):
            self._changed.set()
        else:
            self._wait_again(entries)

    def _wait_again(self, entries: Sequence[Entry]) -> None:
        for entry in reversed(entries):
            if self._is_live(entry):
                self._lanes.add(entry, front=True)
        self._changed.set()

    def _held(self, claim: Claim) -> list[Entry]:
        """The claim's pairs that have not ended meanwhile."""
        found = (self._entries.get(pair.digest) for pair in claim.pairs)
        return [entry for entry, pair in zip(found, claim.pairs, strict=True) if entry and entry.pair is pair]

    def _wanted(self, entries: Sequence[Entry]) -> list[Entry]:
        """Those for which somebody waits; the others are forgotten."""
        for entry in entries:
            if not entry.wanted:
                self._forget(entry)
        return [entry for entry in entries if entry.wanted]

    def _is_live(self, entry: Entry) -> bool:
        return self._entries.get(entry.pair.digest) is entry

    def _end(self, entry: Entry, outcome: Outcome, *, remember: bool = True) -> None:
        if self._is_live(entry):
            self._lanes.discard(entry)
            self._forget(entry)
            if remember:
                self._recent.add(entry.pair.digest, outcome, now=_now())
            self._settle(entry.pair.digest, outcome)

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.pair.digest]
        self._held_bytes -= entry.pair.size_bytes

    def show_metrics(self) -> None:
        """Let the gauges of the queue read this one."""
        for priority in LANES:
            for gauge in (self._metrics.queue_pairs, self._metrics.queue_global_pairs):
                gauge.labels(priority).set_function(partial(self._lanes.count, priority))
        self._metrics.queue_oldest.set_function(self._oldest_seconds)
        self._metrics.live_replicas.set(1)

    def show_alone(self) -> None:
        """Have the gauges of all replicas tell of this one: Redis is lost."""
        for priority in LANES:
            self._metrics.queue_global_pairs.labels(priority).set(self._lanes.count(priority))
        self._metrics.queue_oldest.set(self._oldest_seconds())
        self._metrics.live_replicas.set(1)

    def _oldest_seconds(self) -> float:
        return max(0.0, _now() - self._lanes.oldest_at(PRIORITIES))


def _now() -> float:
    """The event loop's clock, but not as it was when this turn of the loop began (uvloop keeps that)."""
    return time.monotonic()
