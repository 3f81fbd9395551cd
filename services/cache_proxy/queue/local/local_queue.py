"""The miss queue of one process: for `memory:`, for one replica, and for a replica that lost Redis."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter

from services.cache_proxy.errors import PairError, StoreError, Unavailable
from services.cache_proxy.observability.metrics import LANES, PRIORITIES, ProxyMetrics
from services.cache_proxy.queue.interface import (
    MAX_FAILED_BATCHES,
    MAX_REFUSALS,
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
from services.cache_proxy.queue.local.admission import Admission
from services.cache_proxy.queue.local.bisection import Suspects
from services.cache_proxy.queue.local.call_limiter import CallLimiter
from services.cache_proxy.queue.local.fair_queue import Entry, Place
from services.cache_proxy.queue.local.quota_limiter import Accounts, Spent
from services.cache_proxy.queue.local.recent_outcomes import Recent
from services.cache_proxy.queue.local.scheduler import Lanes
from services.cache_proxy.queue.outage import BACKOFF_SPREAD, PROBE_PAIRS, Outage
from services.cache_proxy.queue.quotas import Quota, QuotasNow, none
from services.cache_proxy.queue.snapshot import Overview

_GATHER_SECONDS = 0.05  # where nothing but quotas holds pairs back, so much of them goes together
_PROBE_SECONDS = 0.2  # after which it is looked again whether the call that probes the model is over
_MIN_PUSHBACK_SECONDS = 1.0
_LEAD_SECONDS = 0.015  # so long before its slot a batch is claimed, to be ready when that begins


class LocalQueue:
    """State, touched only from the event loop and never across an await.

    `_entries` has every pair that has not ended: it waits in `_lanes`, is among the `_suspects`, or is in
    flight in a claim. Who ends it removes it *by identity*, so a late answer never ends a pair that was
    asked for anew. `_recent` closes the race between a look-up that missed and the answer that landed
    before the pair was enqueued.
    """

    def __init__(
        self, limits: QueueLimits, *, limiter: CallLimiter, settle: Settle, metrics: ProxyMetrics,
        replicas: Callable[[], int] = lambda: 1, quotas: QuotasNow = none,
        give_up: GiveUp = lambda *_: None,
    ) -> None:  # fmt: skip
        """`replicas`: by how many, this one among them, every quota is shared."""
        self._limits = limits
        self._settle = settle
        self._give_up = give_up
        self._metrics = metrics
        self._entries: dict[bytes, Entry] = {}
        self._held_bytes = 0  # of all entries, waiting or in flight
        self._quotas = quotas
        self._quotas_then = quotas()
        self._accounts = Accounts(slot_seconds=limits.slot_seconds, replicas=replicas, now=_now())
        self._lanes = Lanes(self._accounts, quotas)
        self._admission = Admission(
            limits, lanes=self._lanes, limiter=limiter, accounts=self._accounts, quotas=quotas
        )
        self._suspects: Suspects[Entry] = Suspects(attrgetter("caller"))
        self._recent = Recent()
        self._limiter = limiter
        self._last_claim: Claim | None = None  # the only one whose slot and quotas may be refunded
        self._last_spent: Spent = {}
        self._outage = Outage(window_seconds=limits.retry_window_seconds)
        self._probe: Claim | None = None  # the only call in flight that was begun while calls fail
        self._changed = asyncio.Event()
        self.last_loss: tuple[str, float] | None = None  # it shares nothing
        self.refusal: StoreError | None = None

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
        self._follow_quotas()
        ended, joined, fresh = self._sort(pairs, now)
        waiting = [entry for entry in joined if self._lanes.waits(entry)]
        self._check_model(asker, now=now, fresh=bool(fresh), waits=bool(fresh or waiting))
        places = self._admission.admit(
            list(fresh.values()), waiting, asker, now=now, held_pairs=len(self._entries),
            held_bytes=self._held_bytes,
        )  # fmt: skip
        for entry in joined:
            entry.wanted = True
            entry.traced(asker.trace)
        for place in places:
            self._lanes.join(place.entry, place)
        for entry in joined:
            if not self._lanes.waits(entry):  # in flight or suspect: when it waits again
                self._join(entry, asker)
        for pair in fresh.values():
            self._add(pair, asker, now)
        if fresh:
            self._changed.set()
        return Enqueued(ended, frozenset(fresh))

    def _sort(
        self, pairs: Sequence[Pair], now: float
    ) -> tuple[dict[bytes, Outcome], list[Entry], dict[bytes, Pair]]:
        """Return what ended lately, what is here already, and what is new."""
        ended: dict[bytes, Outcome] = {}
        joined: list[Entry] = []
        fresh: dict[bytes, Pair] = {}
        for pair in pairs:
            entry = self._entries.get(pair.digest)
            outcome = None if entry else self._recent.get(pair.digest, now=now)
            if entry is not None:
                joined.append(entry)
            elif outcome is not None:
                ended[pair.digest] = outcome
            else:
                fresh[pair.digest] = pair
        return ended, joined, fresh

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
        self._follow_quotas()
        ready = self._lanes.ready(now=now)
        failing = self._outage.is_probed
        if failing and self._probe is not None:
            return NotYet(_PROBE_SECONDS)
        most = min(PROBE_PAIRS, self._limits.batch_pairs) if failing else self._limits.batch_pairs
        probe = self._suspects.due(others_wait=ready > 0)[:most]
        count = len(probe) or min(ready, most)
        if not count:
            return NotYet(max(_GATHER_SECONDS, self._lanes.wait_seconds(now=now)))
        linger_seconds = 0.0 if probe or failing or self._full(ready) else self._limits.linger_seconds
        company_comes_until = self._lanes.oldest_at(now=now) + linger_seconds if linger_seconds else now
        slot_at = now + self._limiter.wait_seconds(count, now=now)
        wait_seconds = max(company_comes_until, slot_at - _LEAD_SECONDS) - now
        if wait_seconds > 0:
            return NotYet(wait_seconds)
        entries, counts = probe, dict[Quota, int]()
        if not probe:
            entries, counts = self._lanes.take(
                batch_pairs=most, batch_bytes=self._limits.batch_bytes, now=now
            )
        traces = [trace for entry in entries for trace in entry.traces]
        requests = {entry.request for entry in entries}
        request = requests.pop() if len(requests) == 1 else ""
        claim = Claim("", [entry.pair for entry in entries], slot_at, slot_at, traces, request)
        for entry in entries:
            self._metrics.slot_wait.observe(now - entry.enqueued_at)
            entry.paid_by = entry.paid_by or claim
        self._limiter.spend(len(entries), now=slot_at)
        self._last_spent = self._accounts.spend(counts, now=slot_at)
        self._suspects.sent(claim, probe)
        self._last_claim = claim
        self._probe = claim if failing else self._probe
        return claim

    async def late(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        return claim is self._last_claim and self._limiter.delay(seconds)

    async def put_back(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        if claim is self._last_claim:
            self._accounts.refund(self._last_spent)
        self._free_slot(claim)
        self._probe_is_over(claim)
        for entry in self._held(claim):
            entry.paid_by = None if entry.paid_by is claim else entry.paid_by
        self._not_judged(claim, self._wanted(self._held(claim)))

    async def fulfil(self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True) -> None:
        """See `Queue.fulfil`."""
        if inferred:
            self._answered(claim)
        for entry in self._held(claim):
            outcome = outcomes.get(entry.pair.digest)
            if outcome is not None:
                self._end(entry, outcome)
        if not self._held(claim):
            self._suspects.cleared(claim)
            self._changed.set()

    async def fail(
        self, claim: Claim, error: Unavailable, *, retry_after_seconds: float | None = None,
        suspicious: bool = False, unsent: bool = False,
    ) -> None:  # fmt: skip
        """See `Queue.fail`."""
        now, outage = _now(), self._outage
        outage.fail(
            error.told_to_anyone(), sent_at=claim.send_at, now=now, pushback_seconds=retry_after_seconds,
            suspicious=suspicious, spread=random.uniform(*BACKOFF_SPREAD),  # noqa: S311
        )  # fmt: skip
        error = replace(error, retry_after_seconds=max(_MIN_PUSHBACK_SECONDS, outage.not_before - now))
        self._limiter.hold_until(outage.not_before)
        self._probe_is_over(claim)
        if unsent:
            self._free_slot(claim)
        held = self._held(claim)
        # The model answered something since the failure before, so this one tells of the batch.
        telling = outage.failures == 1
        # Of a lone pair that failed again nothing is known unless others passed meanwhile.
        is_judged = held and (len(held) > 1 or telling)
        enough = 1 if suspicious else MAX_FAILED_BATCHES
        if is_judged and not outage.is_down and all(entry.attempts >= enough for entry in held):
            self._suspect(claim, error, {})
            return
        for entry in held:
            entry.attempts += suspicious or telling
        again = self._wanted(held)
        self._not_judged(claim, again, apart=suspicious and len(held) == 1)
        if not outage.is_down:
            self._give_up(outage.not_before, error)
            return
        for entry in self._lanes.entries() + self._suspects.clear():  # they would wait for nothing
            self._end(entry, error, remember=False)

    def _answered(self, claim: Claim) -> None:
        """The model answered: it may be called as the limit allows."""
        self._probe_is_over(claim)
        if self._outage.failures:
            self._outage.end()
            self._limiter.hold_until(_now())
            self._changed.set()

    def _probe_is_over(self, claim: Claim) -> None:
        if claim is self._probe:
            self._probe = None
            self._changed.set()

    def _free_slot(self, claim: Claim) -> None:
        if claim is self._last_claim:  # the limit is still what this claim made it
            self._limiter.refund(len(claim.pairs))
            self._last_claim = None

    def _check_model(self, asker: Asker, *, now: float, fresh: bool, waits: bool) -> None:
        """Refuse a request that would wait in vain.

        Nothing new is queued while the model is down but for one probe, and nothing waits for a next try that
        comes after the caller's deadline. Raises `Unavailable`.
        """
        outage = self._outage
        outage.expire(now=now)
        wait_seconds = outage.not_before - now
        is_full = fresh and outage.is_down and (wait_seconds > 0 or bool(self._entries))
        is_late = waits and now + wait_seconds > asker.deadline
        if outage.error is not None and (is_full or is_late):
            raise replace(outage.error, retry_after_seconds=max(_MIN_PUSHBACK_SECONDS, wait_seconds))

    async def refuse(self, claim: Claim, error: PairError, named: Mapping[bytes, PairError]) -> None:
        """See `Queue.refuse`."""
        self._answered(claim)
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
            failures_in_a_row=self._outage.failures,
            is_down=self._outage.is_down,
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
            self._join(entry, asker)
        self._changed.set()

    def holds(self, claim: Claim) -> bool:
        """Return whether a pair of the claim has not ended yet."""
        return bool(self._held(claim))

    def withdraw(self) -> set[bytes]:
        """Let another queue have all that is not in flight; the pairs that are."""
        waiting = self._lanes.entries() + self._suspects.clear()
        for entry in waiting:
            self._lanes.discard(entry)
            self._forget(entry)
        return set(self._entries)

    def begin_quotas(self) -> None:
        """Another queue sent until now: what it spent of quotas is not known here."""
        self._accounts.begin(now=_now())

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

    async def admitted(self) -> None:
        """See `ProxyQueue.admitted`: it needs nobody's leave."""

    def discard_all(self) -> None:
        """See `ProxyQueue.discard_all`."""
        self._recent.clear()

    def end_all(self, error: PairError) -> None:
        """End every pair, also those in flight, with `error`: the process is about to end."""
        self._suspects.clear()
        for entry in list(self._entries.values()):
            self._end(entry, error, remember=False)

    def _follow_quotas(self) -> None:
        if self._quotas() is not self._quotas_then:
            self._quotas_then = self._quotas()
            self._lanes.resettle()

    def _add(self, pair: Pair, asker: Asker, now: float) -> None:
        entry = Entry(pair, asker.caller, now, request=asker.request)
        entry.traced(asker.trace)
        account = self._admission.account_of(asker)
        entry.places.append(Place(entry, asker.priority, asker.caller, account))
        self._entries[pair.digest] = entry
        self._held_bytes += pair.size_bytes
        self._lanes.add(entry)

    def _join(self, entry: Entry, asker: Asker) -> None:
        """Have an entry wait as the asker would have it wait, if that is better; admission is not asked."""
        place = self._lanes.place_for(
            entry,
            priority=asker.priority,
            account=self._admission.account_of(asker),
            caller=asker.caller,
        )
        if place is not None:
            self._lanes.join(entry, place)

    def _full(self, ready: int) -> bool:
        all_ready = ready == len(self._lanes)
        return ready >= self._limits.batch_pairs or (
            all_ready and self._lanes.size_bytes >= self._limits.batch_bytes
        )

    def _not_judged(self, claim: Claim, entries: Sequence[Entry], *, apart: bool = False) -> None:
        if self._suspects.undo(claim, entries, apart=apart):
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
                kept = outcome.told_to_anyone() if isinstance(outcome, PairError) else outcome
                self._recent.add(entry.pair.digest, kept, now=_now())
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
        self._metrics.quota_held.set_function(lambda: self._lanes.held(now=_now()))
        self._metrics.live_replicas.set(1)

    def show_alone(self) -> None:
        """Have the gauges of all replicas tell of this one: Redis is lost."""
        for priority in LANES:
            self._metrics.queue_global_pairs.labels(priority).set(self._lanes.count(priority))
        self._metrics.queue_oldest.set(self._oldest_seconds())
        self._metrics.quota_held.set(self._lanes.held(now=_now()))
        self._metrics.live_replicas.set(1)

    def _oldest_seconds(self) -> float:
        return max(0.0, _now() - self._lanes.oldest_at(PRIORITIES))


def _now() -> float:
    """The event loop's clock, but not as it was when this turn of the loop began (uvloop keeps that)."""
    return time.monotonic()
