"""The miss queue of one process: for `memory:`, for one replica, and for a replica that lost Redis."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter

from services.cache_proxy.domain import PRIORITIES, PRIORITY_CLASSES, Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairError, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.interface import (
    MAX_FAILED_BATCHES,
    MAX_REJECTIONS,
    Claim,
    ClaimDeferred,
    EnqueueResult,
    ModelBackoffCallback,
    OutcomeCallback,
    QueueLimits,
    RequestContext,
)
from services.cache_proxy.queue.local.admission import Admission
from services.cache_proxy.queue.local.bisection import BatchBisector
from services.cache_proxy.queue.local.call_limiter import CallLimiter
from services.cache_proxy.queue.local.fair_queue import QueuedPair, QueuePosition
from services.cache_proxy.queue.local.quota_limiter import QuotaConsumption, QuotaLimiter
from services.cache_proxy.queue.local.recent_outcomes import RecentOutcomes
from services.cache_proxy.queue.local.scheduler import BatchScheduler
from services.cache_proxy.queue.outage import BACKOFF_JITTER, PROBE_PAIRS, Outage
from services.cache_proxy.queue.quotas import Quota, QuotaProvider, no_quotas
from services.cache_proxy.queue.snapshot import QueueSnapshot

_QUOTA_LINGER_SECONDS = 0.05  # where nothing but quotas holds pairs back, so much of them goes together
_PROBE_RECHECK_SECONDS = 0.2  # after which it is looked again whether the call that probes the model is over
_MIN_PUSHBACK_SECONDS = 1.0
_CLAIM_AHEAD_SECONDS = 0.015  # so long before its slot a batch is claimed, to be ready when that begins


class LocalQueue:
    """State, touched only from the event loop and never across an await.

    `_entries` has every pair that has not ended: it waits in `_lanes`, is among the `_suspects`, or is in
    flight in a claim. Who ends it removes it *by identity*, so a late answer never ends a pair that was
    asked for anew. `_recent` closes the race between a look-up that missed and the answer that landed
    before the pair was enqueued.
    """

    def __init__(
        self,
        limits: QueueLimits,
        *,
        limiter: CallLimiter,
        on_outcome: OutcomeCallback,
        metrics: ProxyMetrics,
        replicas: Callable[[], int] = lambda: 1,
        quotas: QuotaProvider = no_quotas,
        on_model_backoff: ModelBackoffCallback = lambda *_: None,
    ) -> None:
        """`replicas`: by how many, this one among them, every quota is shared."""
        self._limits = limits
        self._on_outcome = on_outcome
        self._on_model_backoff = on_model_backoff
        self._metrics = metrics
        self._entries: dict[bytes, QueuedPair] = {}
        self._total_bytes = 0  # of all entries, waiting or in flight
        self._quotas = quotas
        self._applied_quotas = quotas()
        self._quota_limiter = QuotaLimiter(slot_seconds=limits.slot_seconds, replicas=replicas, now=_now())
        self._scheduler = BatchScheduler(self._quota_limiter, quotas)
        self._admission = Admission(
            limits,
            scheduler=self._scheduler,
            limiter=limiter,
            quota_limiter=self._quota_limiter,
            quotas=quotas,
        )
        self._bisector: BatchBisector[QueuedPair] = BatchBisector(attrgetter("caller"))
        self._recent_outcomes = RecentOutcomes()
        self._limiter = limiter
        self._last_claim: Claim | None = None  # the only one whose slot and quotas may be refunded
        self._last_consumption: QuotaConsumption = {}
        self._outage = Outage(window_seconds=limits.retry_window_seconds)
        self._outage_probe: Claim | None = None  # the only call in flight that was begun while calls fail
        self._changed = asyncio.Event()
        self.last_loss: tuple[str, float] | None = None  # it shares nothing
        self.blocking_error: StoreError | None = None

    @property
    def is_redis_lost(self) -> bool:
        """See `ProxyQueue.lost`: it shares nothing."""
        return False

    @property
    def store_before_complete(self) -> bool:
        """See `Queue.answers_live_elsewhere`."""
        return False

    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        """See `Queue.enqueue`."""
        now = _now()
        self._apply_quota_changes()
        ended, joined, fresh = self._partition(pairs, now)
        waiting = [entry for entry in joined if self._scheduler.is_waiting(entry)]
        self._check_model_availability(
            context, now=now, has_new_pairs=bool(fresh), has_waiting_pairs=bool(fresh or waiting)
        )
        places = self._admission.admit(
            list(fresh.values()),
            waiting,
            context,
            now=now,
            total_pairs=len(self._entries),
            total_bytes=self._total_bytes,
        )
        for entry in joined:
            entry.is_awaited = True
            entry.add_trace(context.trace_context)
        for place in places:
            self._scheduler.add_position(place.entry, place)
        for entry in joined:
            if not self._scheduler.is_waiting(entry):  # in flight or suspect: when it waits again
                self._join_entry(entry, context)
        for pair in fresh.values():
            self._add_pair(pair, context, now)
        if fresh:
            self._changed.set()
        return EnqueueResult(ended, frozenset(fresh))

    def _partition(
        self, pairs: Sequence[Pair], now: float
    ) -> tuple[dict[bytes, Outcome], list[QueuedPair], dict[bytes, Pair]]:
        """Return what ended lately, what is here already, and what is new."""
        ended: dict[bytes, Outcome] = {}
        joined: list[QueuedPair] = []
        fresh: dict[bytes, Pair] = {}
        for pair in pairs:
            entry = self._entries.get(pair.digest)
            outcome = None if entry else self._recent_outcomes.get(pair.digest, now=now)
            if entry is not None:
                joined.append(entry)
            elif outcome is not None:
                ended[pair.digest] = outcome
            else:
                fresh[pair.digest] = pair
        return ended, joined, fresh

    async def cancel(self, digests: Sequence[bytes]) -> None:
        """See `Queue.leave`."""
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is None:
                continue
            entry.is_awaited = False
            if self._scheduler.discard(entry) or self._bisector.discard(entry):
                self._remove(entry)

    async def claim(self) -> Claim | ClaimDeferred:
        """See `Queue.claim`."""
        now = _now()
        self._apply_quota_changes()
        ready = self._scheduler.eligible_count(now=now)
        failing = self._outage.next_call_is_probe
        if failing and self._outage_probe is not None:
            return ClaimDeferred(_PROBE_RECHECK_SECONDS)
        most = min(PROBE_PAIRS, self._limits.batch_pairs) if failing else self._limits.batch_pairs
        probe = self._bisector.next_probe(others_waiting=ready > 0)[:most]
        count = len(probe) or min(ready, most)
        if not count:
            return ClaimDeferred(max(_QUOTA_LINGER_SECONDS, self._scheduler.quota_wait_seconds(now=now)))
        linger_seconds = (
            0.0 if probe or failing or self._has_full_batch(ready) else self._limits.linger_seconds
        )
        company_comes_until = self._scheduler.oldest_at(now=now) + linger_seconds if linger_seconds else now
        slot_at = now + self._limiter.wait_seconds(count, now=now)
        wait_seconds = max(company_comes_until, slot_at - _CLAIM_AHEAD_SECONDS) - now
        if wait_seconds > 0:
            return ClaimDeferred(wait_seconds)
        entries, counts = probe, dict[Quota, int]()
        if not probe:
            entries, counts = self._scheduler.take_batch(
                batch_pairs=most, batch_bytes=self._limits.batch_bytes, now=now
            )
        traces = [trace for entry in entries for trace in entry.trace_contexts]
        requests = {entry.request_id for entry in entries}
        request = requests.pop() if len(requests) == 1 else ""
        claim = Claim("", [entry.pair for entry in entries], slot_at, slot_at, traces, request)
        for entry in entries:
            self._metrics.slot_wait.observe(now - entry.enqueued_at)
            entry.charged_claim = entry.charged_claim or claim
        self._limiter.consume(len(entries), now=slot_at)
        self._last_consumption = self._quota_limiter.consume(counts, now=slot_at)
        self._bisector.claim_sent(claim, probe)
        self._last_claim = claim
        self._outage_probe = claim if failing else self._outage_probe
        return claim

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        return claim is self._last_claim and self._limiter.postpone(seconds)

    async def release(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        if claim is self._last_claim:
            self._quota_limiter.refund(self._last_consumption)
        self._refund_slot(claim)
        self._end_outage_probe(claim)
        for entry in self._unfinished_entries(claim):
            entry.charged_claim = None if entry.charged_claim is claim else entry.charged_claim
        self._return_undecided(claim, self._drop_unawaited(self._unfinished_entries(claim)))

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """See `Queue.fulfil`."""
        if inferred:
            self._on_model_answered(claim)
        for entry in self._unfinished_entries(claim):
            outcome = outcomes.get(entry.pair.digest)
            if outcome is not None:
                self._complete_entry(entry, outcome)
        if not self._unfinished_entries(claim):
            self._bisector.claim_passed(claim)
            self._changed.set()

    async def fail(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None = None,
        model_fault: bool = False,
        unsent: bool = False,
    ) -> None:
        """See `Queue.fail`."""
        now, outage = _now(), self._outage
        outage.record_failure(
            error.redacted(),
            sent_at=claim.send_at,
            now=now,
            pushback_seconds=retry_after_seconds,
            model_fault=model_fault,
            jitter=random.uniform(*BACKOFF_JITTER),  # noqa: S311
        )
        error = replace(error, retry_after_seconds=max(_MIN_PUSHBACK_SECONDS, outage.not_before - now))
        self._limiter.block_until(outage.not_before)
        self._end_outage_probe(claim)
        if unsent:
            self._refund_slot(claim)
        held = self._unfinished_entries(claim)
        # The model answered something since the failure before, so this one tells of the batch.
        telling = outage.failures == 1
        # Of a lone pair that failed again nothing is known unless others passed meanwhile.
        is_judged = held and (len(held) > 1 or telling)
        enough = 1 if model_fault else MAX_FAILED_BATCHES
        if is_judged and not outage.is_down and all(entry.attempts >= enough for entry in held):
            self._bisect(claim, error, {})
            return
        for entry in held:
            entry.attempts += model_fault or telling
        again = self._drop_unawaited(held)
        self._return_undecided(claim, again, separate=model_fault and len(held) == 1)
        if not outage.is_down:
            self._on_model_backoff(outage.not_before, error)
            return
        for entry in self._scheduler.entries() + self._bisector.clear():  # they would wait for nothing
            self._complete_entry(entry, error, remember=False)

    def _on_model_answered(self, claim: Claim) -> None:
        """The model answered: it may be called as the limit allows."""
        self._end_outage_probe(claim)
        if self._outage.failures:
            self._outage.reset()
            self._limiter.block_until(_now())
            self._changed.set()

    def _end_outage_probe(self, claim: Claim) -> None:
        if claim is self._outage_probe:
            self._outage_probe = None
            self._changed.set()

    def _refund_slot(self, claim: Claim) -> None:
        if claim is self._last_claim:  # the limit is still what this claim made it
            self._limiter.refund(len(claim.pairs))
            self._last_claim = None

    def _check_model_availability(
        self, context: RequestContext, *, now: float, has_new_pairs: bool, has_waiting_pairs: bool
    ) -> None:
        """Refuse a request that would wait in vain.

        Nothing new is queued while the model is down but for one probe, and nothing waits for a next try that
        comes after the caller's deadline. Raises `ModelUnavailableError`.
        """
        outage = self._outage
        outage.expire(now=now)
        wait_seconds = outage.not_before - now
        is_full = has_new_pairs and outage.is_down and (wait_seconds > 0 or bool(self._entries))
        is_late = has_waiting_pairs and now + wait_seconds > context.deadline
        if outage.error is not None and (is_full or is_late):
            raise replace(outage.error, retry_after_seconds=max(_MIN_PUSHBACK_SECONDS, wait_seconds))

    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        """See `Queue.refuse`."""
        self._on_model_answered(claim)
        self._bisect(claim, error, errors_by_digest)

    def _bisect(self, claim: Claim, error: PairError, rejections: Mapping[bytes, PairError]) -> None:
        innocent, suspected = [], []
        entries = self._unfinished_entries(claim)
        for entry in entries:
            entry.rejections += 1
            if rejections or len(entries) == 1 or entry.rejections >= MAX_REJECTIONS:
                reason = rejections.get(entry.pair.digest, None if rejections else error)
                if reason is None:
                    innocent.append(entry)
                else:
                    self._complete_entry(entry, reason)
            else:
                suspected.append(entry)
        no_longer_suspected = self._bisector.claim_rejected(claim, self._drop_unawaited(suspected))
        self._requeue(self._drop_unawaited(innocent) + no_longer_suspected)

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:  # noqa: ARG002 - it shares no reports
        """See `ProxyQueue.overview`."""
        limits, limiter = self._limits, self._limiter
        next_pairs = min(len(self._scheduler) + 1, limits.batch_pairs)
        next_call_seconds = limiter.wait_seconds(next_pairs, now=_now())
        return QueueSnapshot(
            now_seconds=time.time(),
            waiting={lane: self._scheduler.count(lane) for lane in PRIORITY_CLASSES},
            next_call_seconds=next_call_seconds if math.isfinite(next_call_seconds) else None,
            batch_pairs=limits.batch_pairs,
            batch_interval_seconds=limiter.slot_seconds,
            pairs_per_second=limits.pairs_per_second,
            calls_per_second=limits.calls_per_second,
            failures_in_a_row=self._outage.failures,
            is_down=self._outage.is_down,
            live_replicas=1,
            silent_replicas=None,
        )

    async def wait_for_change(self) -> None:
        """See `Queue.changed`."""
        await self._changed.wait()
        self._changed.clear()

    def adopt(self, pair: Pair, context: RequestContext) -> None:
        """Have a pair wait that another queue had admitted."""
        entry = self._entries.get(pair.digest)
        if entry is None:
            self._add_pair(pair, context, _now())
        else:
            entry.is_awaited = True
            entry.add_trace(context.trace_context)
            self._join_entry(entry, context)
        self._changed.set()

    def has_unfinished_pairs(self, claim: Claim) -> bool:
        """Return whether a pair of the claim has not ended yet."""
        return bool(self._unfinished_entries(claim))

    def remove_waiting(self) -> set[bytes]:
        """Let another queue have all that is not in flight; the pairs that are."""
        waiting = self._scheduler.entries() + self._bisector.clear()
        for entry in waiting:
            self._scheduler.discard(entry)
            self._remove(entry)
        return set(self._entries)

    def reset_quotas(self) -> None:
        """Another queue sent until now: what it spent of quotas is not known here."""
        self._quota_limiter.reset(now=_now())

    def complete_elsewhere(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Pairs were answered by a call that another queue had allowed."""
        for digest, outcome in outcomes.items():
            entry = self._entries.get(digest)
            if entry is not None:
                self._bisector.discard(entry)
                self._complete_entry(entry, outcome)

    def discard(self, digest: bytes) -> None:
        """See `ProxyQueue.discard`."""
        self._recent_outcomes.remove(digest)

    async def wait_for_access(self) -> None:
        """See `ProxyQueue.admitted`: it needs nobody's leave."""

    def discard_all(self) -> None:
        """See `ProxyQueue.discard_all`."""
        self._recent_outcomes.clear()

    def fail_all(self, error: PairError) -> None:
        """End every pair, also those in flight, with `error`: the process is about to end."""
        self._bisector.clear()
        for entry in list(self._entries.values()):
            self._complete_entry(entry, error, remember=False)

    def _apply_quota_changes(self) -> None:
        if self._quotas() is not self._applied_quotas:
            self._applied_quotas = self._quotas()
            self._scheduler.reassign_quotas()

    def _add_pair(self, pair: Pair, context: RequestContext, now: float) -> None:
        entry = QueuedPair(pair, context.caller, now, request_id=context.request_id)
        entry.add_trace(context.trace_context)
        account = self._admission.account_for(context)
        entry.positions.append(QueuePosition(entry, context.priority, context.caller, account))
        self._entries[pair.digest] = entry
        self._total_bytes += pair.size_bytes
        self._scheduler.add(entry)

    def _join_entry(self, entry: QueuedPair, context: RequestContext) -> None:
        """Have an entry wait as the asker would have it wait, if that is better; admission is not asked."""
        place = self._scheduler.position_for(
            entry,
            priority=context.priority,
            account=self._admission.account_for(context),
            caller=context.caller,
        )
        if place is not None:
            self._scheduler.add_position(entry, place)

    def _has_full_batch(self, ready: int) -> bool:
        all_ready = ready == len(self._scheduler)
        return ready >= self._limits.batch_pairs or (
            all_ready and self._scheduler.size_bytes >= self._limits.batch_bytes
        )

    def _return_undecided(
        self, claim: Claim, entries: Sequence[QueuedPair], *, separate: bool = False
    ) -> None:
        if self._bisector.claim_undecided(claim, entries, separate=separate):
            self._changed.set()
        else:
            self._requeue(entries)

    def _requeue(self, entries: Sequence[QueuedPair]) -> None:
        for entry in reversed(entries):
            if self._is_current(entry):
                self._scheduler.add(entry, at_front=True)
        self._changed.set()

    def _unfinished_entries(self, claim: Claim) -> list[QueuedPair]:
        """The claim's pairs that have not ended meanwhile."""
        found = (self._entries.get(pair.digest) for pair in claim.pairs)
        return [entry for entry, pair in zip(found, claim.pairs, strict=True) if entry and entry.pair is pair]

    def _drop_unawaited(self, entries: Sequence[QueuedPair]) -> list[QueuedPair]:
        """Those for which somebody waits; the others are forgotten."""
        for entry in entries:
            if not entry.is_awaited:
                self._remove(entry)
        return [entry for entry in entries if entry.is_awaited]

    def _is_current(self, entry: QueuedPair) -> bool:
        return self._entries.get(entry.pair.digest) is entry

    def _complete_entry(self, entry: QueuedPair, outcome: Outcome, *, remember: bool = True) -> None:
        if self._is_current(entry):
            self._scheduler.discard(entry)
            self._remove(entry)
            if remember:
                kept = outcome.redacted() if isinstance(outcome, PairError) else outcome
                self._recent_outcomes.add(entry.pair.digest, kept, now=_now())
            self._on_outcome(entry.pair.digest, outcome)

    def _remove(self, entry: QueuedPair) -> None:
        del self._entries[entry.pair.digest]
        self._total_bytes -= entry.pair.size_bytes

    def register_gauges(self) -> None:
        """Let the gauges of the queue read this one."""
        for priority in PRIORITY_CLASSES:
            for gauge in (self._metrics.queue_pairs, self._metrics.queue_global_pairs):
                gauge.labels(priority).set_function(partial(self._scheduler.count, priority))
        self._metrics.queue_oldest_seconds.set_function(self._oldest_seconds)
        self._metrics.quota_held_pairs.set_function(lambda: self._scheduler.quota_blocked_count(now=_now()))
        self._metrics.live_replicas.set(1)

    def show_local_metrics(self) -> None:
        """Have the gauges of all replicas tell of this one: Redis is lost."""
        for priority in PRIORITY_CLASSES:
            self._metrics.queue_global_pairs.labels(priority).set(self._scheduler.count(priority))
        self._metrics.queue_oldest_seconds.set(self._oldest_seconds())
        self._metrics.quota_held_pairs.set(self._scheduler.quota_blocked_count(now=_now()))
        self._metrics.live_replicas.set(1)

    def _oldest_seconds(self) -> float:
        return max(0.0, _now() - self._scheduler.oldest_at(PRIORITIES))


def _now() -> float:
    """The event loop's clock, but not as it was when this turn of the loop began (uvloop keeps that)."""
    return time.monotonic()
