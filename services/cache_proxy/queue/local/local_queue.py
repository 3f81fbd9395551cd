"""The queue of one process, used with `memory:`, with one replica, and by a replica that has lost Redis.

The module is longer than 250 lines because one class owns all state: each of its methods is one decision on
the whole queue, made without an await.
"""

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
    Queue,
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
from services.common.compat import override

# Where only quotas hold pairs back, wait at least this long, so that several pairs go in one call.
_QUOTA_LINGER_SECONDS = 0.05
# While a call probes the model, check again after this time whether it has ended.
_PROBE_RECHECK_SECONDS = 0.2
_MIN_PUSHBACK_SECONDS = 1.0
# A batch is claimed this long before its slot, so that it is ready when the slot begins.
_CLAIM_AHEAD_SECONDS = 0.015


class LocalQueue(Queue):
    """A queue whose whole state is in this process.

    State, used only from the event loop and never across an await:

    - `_entries`: every pair that has not ended. It waits in `_scheduler`, waits to be probed in `_bisector`,
      or belongs to a claim. An entry is removed *by identity*: a late answer must not end a pair that
      was enqueued again meanwhile.
    - `_recent_outcomes`: pairs that ended recently. It closes the race between a lookup that missed and the
      answer that arrived before the pair was enqueued.
    - `_last_claim`: the only claim whose slot and quotas can still be refunded, because nothing was claimed
      after it. `_last_consumption` is what it consumed of quotas.
    - `_outage`: failed calls in a row. `_outage_probe`: the claim of the only call that is sent while calls
      fail.
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
        """Create an empty queue.

        `replicas` returns how many replicas, this one included, share the quotas.
        """
        self._limits = limits
        self._on_outcome = on_outcome
        self._on_model_backoff = on_model_backoff
        self._metrics = metrics
        self._entries: dict[bytes, QueuedPair] = {}
        self._total_bytes = 0
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
        self._last_claim: Claim | None = None
        self._last_consumption: QuotaConsumption = {}
        self._outage = Outage(window_seconds=limits.retry_window_seconds)
        self._outage_probe: Claim | None = None
        self._changed = asyncio.Event()
        # For `ManagedQueue`: nothing is shared, so nothing can be lost.
        self.last_loss: tuple[str, float] | None = None
        self.blocking_error: StoreError | None = None

    @property
    def is_redis_lost(self) -> bool:
        """Return False: this queue does not use Redis."""
        return False

    @property
    @override
    def store_before_complete(self) -> bool:
        return False

    @override
    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        now = _now()
        self._apply_quota_changes()
        outcomes, joined, new_pairs = self._partition(pairs, now)
        waiting = [entry for entry in joined if self._scheduler.is_waiting(entry)]
        self._check_model_availability(
            context, now=now, has_new_pairs=bool(new_pairs), has_waiting_pairs=bool(new_pairs or waiting)
        )
        # All checks come first: if one raises, nothing has changed.
        positions = self._admission.admit(
            list(new_pairs.values()),
            waiting,
            context,
            now=now,
            total_pairs=len(self._entries),
            total_bytes=self._total_bytes,
        )

        # Join the pairs that are here already: in a better position of the queue if admission found one.
        for entry in joined:
            entry.is_awaited = True
            entry.add_trace(context.trace_context)
        for position in positions:
            self._scheduler.add_position(position.entry, position)
        for entry in joined:
            # A pair that was sent or is being bisected takes the position if it has to wait again.
            if not self._scheduler.is_waiting(entry):
                self._join_entry(entry, context)

        # Queue the new pairs.
        for pair in new_pairs.values():
            self._add_pair(pair, context, now)
        if new_pairs:
            self._changed.set()
        return EnqueueResult(outcomes, frozenset(new_pairs))

    def _partition(
        self, pairs: Sequence[Pair], now: float
    ) -> tuple[dict[bytes, Outcome], list[QueuedPair], dict[bytes, Pair]]:
        """Return the outcomes of pairs that ended recently, the entries of known pairs, and the new pairs."""
        outcomes: dict[bytes, Outcome] = {}
        joined: list[QueuedPair] = []
        new_pairs: dict[bytes, Pair] = {}
        for pair in pairs:
            entry = self._entries.get(pair.digest)
            outcome = None if entry else self._recent_outcomes.get(pair.digest, now=now)
            if entry is not None:
                joined.append(entry)
            elif outcome is not None:
                outcomes[pair.digest] = outcome
            else:
                new_pairs[pair.digest] = pair
        return outcomes, joined, new_pairs

    @override
    async def cancel(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            entry = self._entries.get(digest)
            if entry is None:
                continue
            entry.is_awaited = False
            if self._scheduler.discard(entry) or self._bisector.discard(entry):
                self._remove(entry)

    @override
    async def claim(self) -> Claim | ClaimDeferred:
        now = _now()
        self._apply_quota_changes()

        # While calls fail, one small call at a time probes whether the model is back.
        failing = self._outage.next_call_is_probe
        if failing and self._outage_probe is not None:
            return ClaimDeferred(_PROBE_RECHECK_SECONDS)
        max_pairs = min(PROBE_PAIRS, self._limits.batch_pairs) if failing else self._limits.batch_pairs

        # The next batch is either a probe of the bisection or the front of the queue.
        eligible = self._scheduler.eligible_count(now=now)
        probe = self._bisector.next_probe(others_waiting=eligible > 0)[:max_pairs]
        count = len(probe) or min(eligible, max_pairs)
        if not count:
            return ClaimDeferred(max(_QUOTA_LINGER_SECONDS, self._scheduler.quota_wait_seconds(now=now)))

        # Wait until the batch has lingered long enough for more pairs, and until shortly before its slot.
        linger_seconds = (
            0.0 if probe or failing or self._has_full_batch(eligible) else self._limits.linger_seconds
        )
        lingers_until = self._scheduler.oldest_at(now=now) + linger_seconds if linger_seconds else now
        slot_at = now + self._limiter.wait_seconds(count, now=now)
        wait_seconds = max(lingers_until, slot_at - _CLAIM_AHEAD_SECONDS) - now
        if wait_seconds > 0:
            return ClaimDeferred(wait_seconds)

        # Take the batch, and consume its slot and quotas.
        entries = probe
        counts: dict[Quota, int] = {}
        if not probe:
            entries, counts = self._scheduler.take_batch(
                batch_pairs=max_pairs, batch_bytes=self._limits.batch_bytes, now=now
            )
        traces = [trace for entry in entries for trace in entry.trace_contexts]
        request_ids = {entry.request_id for entry in entries}
        request_id = request_ids.pop() if len(request_ids) == 1 else ""
        claim = Claim("", [entry.pair for entry in entries], slot_at, slot_at, traces, request_id)
        for entry in entries:
            self._metrics.slot_wait.observe(now - entry.enqueued_at)
            entry.charged_claim = entry.charged_claim or claim
        self._limiter.consume(len(entries), now=slot_at)
        self._last_consumption = self._quota_limiter.consume(counts, now=slot_at)
        self._bisector.claim_sent(claim, probe)
        self._last_claim = claim
        self._outage_probe = claim if failing else self._outage_probe
        return claim

    @override
    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        return claim is self._last_claim and self._limiter.postpone(seconds)

    @override
    async def release(self, claim: Claim) -> None:
        if claim is self._last_claim:
            self._quota_limiter.refund(self._last_consumption)
        self._refund_slot(claim)
        self._end_outage_probe(claim)
        for entry in self._unfinished_entries(claim):
            entry.charged_claim = None if entry.charged_claim is claim else entry.charged_claim
        self._return_undecided(claim, self._drop_unawaited(self._unfinished_entries(claim)))

    @override
    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        if inferred:
            self._on_model_answered(claim)
        for entry in self._unfinished_entries(claim):
            outcome = outcomes.get(entry.pair.digest)
            if outcome is not None:
                self._complete_entry(entry, outcome)
        if not self._unfinished_entries(claim):
            self._bisector.claim_passed(claim)
            self._changed.set()

    @override
    async def fail(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None = None,
        model_fault: bool = False,
        unsent: bool = False,
    ) -> None:
        now = _now()
        outage = self._outage
        outage.record_failure(
            error.redacted(),
            sent_at=claim.send_at,
            now=now,
            pushback_seconds=retry_after_seconds,
            model_fault=model_fault,
            jitter=random.uniform(*BACKOFF_JITTER),  # noqa: S311 - jitter, not a secret
        )
        error = replace(error, retry_after_seconds=max(_MIN_PUSHBACK_SECONDS, outage.not_before - now))
        self._limiter.block_until(outage.not_before)
        self._end_outage_probe(claim)
        if unsent:
            self._refund_slot(claim)

        # The first failure in a row is evidence against the batch: the model answered other calls just
        # before. Later ones may be due to an outage. A lone pair that fails again proves nothing unless
        # other calls passed meanwhile.
        entries = self._unfinished_entries(claim)
        is_first_failure = outage.failures == 1
        is_evidence = entries and (len(entries) > 1 or is_first_failure)
        attempts_to_suspect = 1 if model_fault else MAX_FAILED_BATCHES
        if (
            is_evidence
            and not outage.is_down
            and all(entry.attempts >= attempts_to_suspect for entry in entries)
        ):
            self._bisect(claim, error, {})
            return

        # Otherwise the pairs are tried again.
        for entry in entries:
            entry.attempts += model_fault or is_first_failure
        awaited = self._drop_unawaited(entries)
        self._return_undecided(claim, awaited, separate=model_fault and len(entries) == 1)
        if not outage.is_down:
            self._on_model_backoff(outage.not_before, error)
            return

        # The retry window is over: all waiting pairs end with the error.
        for entry in self._scheduler.entries() + self._bisector.clear():
            self._complete_entry(entry, error, remember=False)

    def _on_model_answered(self, claim: Claim) -> None:
        """End an outage: from now on the model is called as often as the rate limit allows."""
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
        # Only while no other claim has consumed from the limiter.
        if claim is self._last_claim:
            self._limiter.refund(len(claim.pairs))
            self._last_claim = None

    def _check_model_availability(
        self, context: RequestContext, *, now: float, has_new_pairs: bool, has_waiting_pairs: bool
    ) -> None:
        """Raise `ModelUnavailableError` for a request that would wait in vain.

        While the model is down, only the pairs of one probe are queued. No request waits for a retry that
        comes after its deadline.
        """
        outage = self._outage
        outage.expire(now=now)
        wait_seconds = outage.not_before - now
        is_full = has_new_pairs and outage.is_down and (wait_seconds > 0 or bool(self._entries))
        is_late = has_waiting_pairs and now + wait_seconds > context.deadline
        if outage.error is not None and (is_full or is_late):
            raise replace(outage.error, retry_after_seconds=max(_MIN_PUSHBACK_SECONDS, wait_seconds))

    @override
    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        self._on_model_answered(claim)
        self._bisect(claim, error, errors_by_digest)

    def _bisect(self, claim: Claim, error: PairError, rejections: Mapping[bytes, PairError]) -> None:
        """End the rejected pairs of a batch, or search for them.

        If `rejections` names pairs, they end and the others wait again. Otherwise a lone pair, or one that
        was in too many rejected batches, ends with `error`, and the others are bisected.
        """
        acquitted = []
        suspected = []
        entries = self._unfinished_entries(claim)
        for entry in entries:
            entry.rejections += 1
            if rejections or len(entries) == 1 or entry.rejections >= MAX_REJECTIONS:
                reason = rejections.get(entry.pair.digest, None if rejections else error)
                if reason is None:
                    acquitted.append(entry)
                else:
                    self._complete_entry(entry, reason)
            else:
                suspected.append(entry)
        # The half that was not sent is no longer suspected: the rejected pair is in this half.
        no_longer_suspected = self._bisector.claim_rejected(claim, self._drop_unawaited(suspected))
        self._requeue(self._drop_unawaited(acquitted) + no_longer_suspected)

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:  # noqa: ARG002 - no reports are shared
        """Return the state of the queue for the status page."""
        limits = self._limits
        limiter = self._limiter
        next_pairs = min(len(self._scheduler) + 1, limits.batch_pairs)
        next_call_seconds = limiter.wait_seconds(next_pairs, now=_now())
        return QueueSnapshot(
            now_seconds=time.time(),
            waiting={priority: self._scheduler.count(priority) for priority in PRIORITY_CLASSES},
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

    @override
    async def wait_for_change(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def adopt(self, pair: Pair, context: RequestContext) -> None:
        """Queue a pair that another queue had admitted, without admission."""
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
        """Remove all pairs that no claim has, for another queue. Return the digests of the others."""
        waiting = self._scheduler.entries() + self._bisector.clear()
        for entry in waiting:
            self._scheduler.discard(entry)
            self._remove(entry)
        return set(self._entries)

    def reset_quotas(self) -> None:
        """Assume that all quotas are used up: another queue sent pairs until now."""
        self._quota_limiter.reset(now=_now())

    def complete_elsewhere(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """End pairs that were answered by a call which another queue had claimed."""
        for digest, outcome in outcomes.items():
            entry = self._entries.get(digest)
            if entry is not None:
                self._bisector.discard(entry)
                self._complete_entry(entry, outcome)

    def discard(self, digest: bytes) -> None:
        """Forget the recent outcome of a pair: it was invalidated."""
        self._recent_outcomes.remove(digest)

    async def wait_for_access(self) -> None:
        """Return at once: this queue needs no access to Redis."""

    def discard_all(self) -> None:
        """Forget all recent answers."""
        self._recent_outcomes.clear()

    def fail_all(self, error: PairError) -> None:
        """End every pair with `error`, also those of claims, because the process is about to exit."""
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
        """Give an entry the position of a request that joined it, if that is better, without admission."""
        position = self._scheduler.position_for(
            entry,
            priority=context.priority,
            account=self._admission.account_for(context),
            caller=context.caller,
        )
        if position is not None:
            self._scheduler.add_position(entry, position)

    def _has_full_batch(self, eligible: int) -> bool:
        all_eligible = eligible == len(self._scheduler)
        return eligible >= self._limits.batch_pairs or (
            all_eligible and self._scheduler.size_bytes >= self._limits.batch_bytes
        )

    def _return_undecided(
        self, claim: Claim, entries: Sequence[QueuedPair], *, separate: bool = False
    ) -> None:
        """Return pairs of a claim that showed nothing about them, to the bisector or the scheduler."""
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
        """Return the entries of the claim's pairs that have not ended meanwhile."""
        found = (self._entries.get(pair.digest) for pair in claim.pairs)
        return [entry for entry, pair in zip(found, claim.pairs, strict=True) if entry and entry.pair is pair]

    def _drop_unawaited(self, entries: Sequence[QueuedPair]) -> list[QueuedPair]:
        """Remove entries for which no request waits any more. Return the others."""
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
        """Let the gauges of the queue read the state of this one."""
        for priority in PRIORITY_CLASSES:
            for gauge in (self._metrics.queue_pairs, self._metrics.queue_global_pairs):
                gauge.labels(priority).set_function(partial(self._scheduler.count, priority))
        self._metrics.queue_oldest_seconds.set_function(self._oldest_seconds)
        self._metrics.quota_held_pairs.set_function(lambda: self._scheduler.quota_blocked_count(now=_now()))
        self._metrics.live_replicas.set(1)

    def show_local_metrics(self) -> None:
        """Set the gauges of all replicas to the state of this one, because Redis is lost."""
        for priority in PRIORITY_CLASSES:
            self._metrics.queue_global_pairs.labels(priority).set(self._scheduler.count(priority))
        self._metrics.queue_oldest_seconds.set(self._oldest_seconds())
        self._metrics.quota_held_pairs.set(self._scheduler.quota_blocked_count(now=_now()))
        self._metrics.live_replicas.set(1)

    def _oldest_seconds(self) -> float:
        return max(0.0, _now() - self._scheduler.oldest_at(PRIORITIES))


def _now() -> float:
    """Return the current time of the event loop's clock.

    `loop.time()` of uvloop returns the time at which the current iteration of the loop began.
    """
    return time.monotonic()
