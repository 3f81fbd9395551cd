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

from services.cache_proxy.batching import MicroBatcher
from services.cache_proxy.domain import DIGEST_BYTES, PACE, PRIORITY_CLASSES, Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairError, QueueFullError, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue import rejections
from services.cache_proxy.queue.interface import (
    INVALID_RESPONSE_TTL_SECONDS,
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
from services.cache_proxy.queue.outage import (
    BACKOFF_JITTER,
    MAX_BACKOFF_SECONDS,
    MAX_MODEL_FAULT_BACKOFF_SECONDS,
    MAX_MODEL_FAULTS,
    MIN_BACKOFF_SECONDS,
    Outage,
)
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.quotas import Quota, QuotaProvider, no_quotas
from services.cache_proxy.queue.serialization import pack, pack_error, unpack, unpack_error
from services.cache_proxy.queue.snapshot import MAX_REPORT_BYTES, MAX_REPORTS, QueueSnapshot, decode_snapshot
from services.cache_proxy.queue.waiting_pairs import Requester, WaitingPair, WaitingSnapshot
from services.common.levels import LEVELS

_log = logging.getLogger(__name__)

_CHUNK_PAIRS = 500  # a script call of this size holds Redis for about 5 ms
_BYTES_PER_EXTRA_WEIGHT = 1024  # texts beyond that count as so many pairs more
_STATE_JOINED, _STATE_FAILED, _STATE_QUEUED = 17, 18, 16
_LEASE_MARGIN_SECONDS = 5.0
_CLAIM_AHEAD_MS = 60
_TIMER_ROUNDING_MS = 2  # scripts and the loop's timers count whole milliseconds, and each rounds up
_FIRST_DEFERRAL_SECONDS, _MAX_DEFERRAL_SECONDS = (
    30.0,
    60.0,
)  # while others' calls are answered and its own failed
_HELP_SECONDS = 1.0
_MIN_PUSHBACK_SECONDS = 1.0
_DEFER_SECONDS = 0.2  # whose calls just failed lets another replica have the next slot
_PARTIAL_PUBLISH_SECONDS = 0.06  # for two parts of 500 to be published, on a machine with little time
_JOINER_CLAIM_DELAY_SECONDS = 0.5  # whoever queued a pair claims it; whose replica is gone or paused does not
_LEVEL_BYTES = 17
_REQUEST_PAIRS_INDEX = 7  # the place of a request's pairs in it
_MAX_TIMEOUT_SECONDS = 86_400.0
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
        self,
        scripts: Scripts,
        *,
        replica: str,
        limits: QueueLimits,
        lease_seconds: float,
        on_outcome: OutcomeCallback,
        metrics: ProxyMetrics,
        quotas: QuotaProvider = no_quotas,
        on_model_backoff: ModelBackoffCallback = lambda *_: None,
    ) -> None:
        self._scripts = scripts
        self.replica = replica
        self.server_run_id = ""
        self._limits = limits
        self._linger_ms = max(0, round(limits.linger_seconds * 1000) - _TIMER_ROUNDING_MS)
        self._lease_ms = round((lease_seconds + _LEASE_MARGIN_SECONDS) * 1000)
        self._on_outcome = on_outcome
        self._on_model_backoff = on_model_backoff
        self._metrics = metrics
        self._quotas = quotas
        self._batcher = MicroBatcher(
            self._enqueue_batch,
            size=lambda request: sum(
                _pair_weight(size_bytes) for *_, size_bytes in request[_REQUEST_PAIRS_INDEX]
            ),
            max_size=_CHUNK_PAIRS,
        )
        self._waiting_pairs: dict[bytes, WaitingPair] = {}
        self._claimed_digests: dict[str, set[bytes]] = {}
        self._interest_lock = asyncio.Lock()
        self._ids = itertools.count(1)
        self._changed = asyncio.Event()
        self._claim_timer: asyncio.TimerHandle | None = None
        self._not_before = 0.0
        self._own_outage = Outage(window_seconds=limits.retry_window_seconds)
        self._assist_until = 0.0
        for priority in PRIORITY_CLASSES:
            metrics.queue_pairs.labels(priority).set_function(partial(self._count_waiting, priority))

    @property
    def store_before_complete(self) -> bool:
        """See `Queue.answers_live_elsewhere`: a Cluster's buckets are on all nodes."""
        return self._scripts.on_cluster

    @property
    def claim_ids(self) -> list[str]:
        """The ids of the claims in work here."""
        return list(self._claimed_digests)

    def snapshot_waiting(self) -> WaitingSnapshot:
        """Return what is known now of each pair for which somebody here waits."""
        return {
            digest: (asked, asked.requesters, asked.deadline) for digest, asked in self._waiting_pairs.items()
        }

    def unchanged_since(self, earlier: WaitingSnapshot) -> set[bytes]:
        """Return the pairs of which all is as it was noted: not left and asked again, not joined since."""
        return {
            digest
            for digest, (asked, turns, deadline) in earlier.items()
            if self._waiting_pairs.get(digest) is asked
            and asked.requesters is turns
            and asked.deadline == deadline
        }

    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        """See `Queue.enqueue`."""
        added = self.register_interest(pairs, context)
        token = context.request_id or self._new_id()
        ended: dict[bytes, Outcome] = {}
        queued: set[bytes] = set()
        done, size_bytes = 0, sum(pair.size_bytes for pair in pairs)
        look_after: list[float] = []
        try:
            for chunk in _weighted_chunks(pairs):
                size_bytes -= sum(pair.size_bytes for pair in chunk)
                following = (len(pairs) - done - len(chunk), size_bytes)
                states, errors, seconds = await self._enqueue_chunk(
                    chunk, context, token, following, is_re_enqueue=False
                )
                self._partition_replies(chunk, states, errors, ended, queued)
                self.add_requester(chunk, context)
                look_after.append(seconds)
                done += len(chunk)
                if not seconds and done >= self._limits.batch_pairs:
                    self._changed.set()  # what follows may take seconds
        except (
            QueueFullError,
            ModelUnavailableError,
        ):  # whoever else asked for the same pairs may still wait
            mine = [
                digest
                for digest in added
                if digest in self._waiting_pairs and not self._waiting_pairs[digest].is_shared
            ]
            joined = {pair.digest for pair in pairs[:done]}  # those before the first new one
            for digest in mine:
                if digest not in joined:
                    del self._waiting_pairs[digest]
            await self.cancel([digest for digest in mine if digest in joined])
            raise
        except BaseException:  # of what may have been queued all the same
            self._changed.set()
            raise
        self.apply_known_outcomes(ended, new_digests=added)
        if look_after:
            self._schedule_claim(min(look_after))
        return EnqueueResult(ended, frozenset(queued))

    def apply_known_outcomes(
        self, outcomes: Mapping[bytes, Outcome], *, new_digests: Collection[bytes]
    ) -> None:
        """These had ended already, as the request is told that asked; so is whoever asked before or since."""
        alone = set(new_digests)
        for digest, outcome in outcomes.items():
            asked = self._waiting_pairs.pop(digest, None)
            if asked is not None and (asked.is_shared or digest not in alone):
                self._on_outcome(digest, outcome)

    def register_interest(self, pairs: Sequence[Pair], context: RequestContext) -> list[bytes]:
        """Somebody here waits for these pairs; those that nobody did before.

        Pairs that somebody did are in this asker's turn too once that is admitted: see `join`.
        """
        added = []
        turns = (self._requester(context),)
        for pair in pairs:
            known = self._waiting_pairs.get(pair.digest)
            if known is None:
                added.append(pair.digest)
                self._waiting_pairs[pair.digest] = WaitingPair(
                    pair, turns, context.deadline, context.trace_context
                )
            else:
                known.is_shared = True
                known.deadline = max(known.deadline, context.deadline)
        return added

    def add_requester(self, pairs: Sequence[Pair], context: RequestContext) -> None:
        """The asker was admitted: from now on its pairs wait with its priority, if that is the better one."""
        turn = self._requester(context)
        for pair in pairs:
            asked = self._waiting_pairs.get(pair.digest)
            if asked is not None:
                asked.add_requester(turn)

    def _requester(self, context: RequestContext) -> Requester:
        quota = self._quota_for(context)
        return Requester(None if quota is None else quota.account, context.caller, context.priority)

    def _quota_for(self, context: RequestContext) -> Quota | None:
        return None if context.priority == "refresh" else self._quotas().for_caller(context.caller)

    async def re_enqueue(self, *, exclude: Collection[bytes] = ()) -> None:
        """Enqueue once more all that somebody here waits for: heals lost messages and a lost queue."""
        by_asker: dict[tuple[str, str, bytes], list[WaitingPair]] = {}
        for digest, asked in self._waiting_pairs.items():
            for turn in () if digest in exclude else asked.requesters:
                by_asker.setdefault((turn.caller, turn.priority, asked.trace_context), []).append(asked)
        together: list[tuple[Sequence[Pair], RequestContext]] = []  # callers may be many, with few pairs each
        size = 0
        for (caller, priority, trace), group in by_asker.items():
            asker = RequestContext(caller, priority, max(asked.deadline for asked in group), trace)
            for chunk in _weighted_chunks([asked.pair for asked in group]):
                together.append((chunk, asker))
                size += sum(_pair_weight(pair.size_bytes) for pair in chunk)
                if size >= _CHUNK_PAIRS:
                    await self._re_enqueue_chunks(together)
                    together, size = [], 0
        await self._re_enqueue_chunks(together)
        self._changed.set()

    async def _re_enqueue_chunks(self, chunks: Iterable[tuple[Sequence[Pair], RequestContext]]) -> None:
        asking = (self._re_enqueue_chunk(pairs, asker) for pairs, asker in chunks)
        for failed in await asyncio.gather(*asking, return_exceptions=True):
            if failed is not None:
                raise failed

    async def _re_enqueue_chunk(self, chunk: Sequence[Pair], context: RequestContext) -> None:
        pairs = [pair for pair in chunk if pair.digest in self._waiting_pairs]
        states, errors, _ = await self._enqueue_chunk(
            pairs, context, self._new_id(), (0, 0), is_re_enqueue=True
        )
        ended: dict[bytes, Outcome] = {}
        self._partition_replies(pairs, states, errors, ended, set())
        self.resolve({digest: outcome for digest, outcome in ended.items() if digest in self._waiting_pairs})
        await self._cancel_interest(
            [pair.digest for pair in pairs if pair.digest not in ended]
        )  # while it was asked

    async def cancel(self, digests: Sequence[bytes], *, notify_redis: bool = True) -> None:
        """See `Queue.leave`."""
        gone = [digest for digest in digests if self._waiting_pairs.pop(digest, None) is not None]
        for chunk in _chunks(gone if notify_redis else []):
            await self._cancel_interest(chunk)

    async def _cancel_interest(self, digests: Sequence[bytes]) -> None:
        if all(digest in self._waiting_pairs for digest in digests):
            return
        async with self._interest_lock:
            gone = [
                digest for digest in digests if digest not in self._waiting_pairs
            ]  # nor asked for again meanwhile
            if gone:
                await self._scripts.run(
                    "cancel", [self.replica, b"".join(gone), int(not self._waiting_pairs)]
                )

    def unclaimed_pairs(self) -> list[tuple[Pair, RequestContext]]:
        """Return all pairs that wait here, once for each turn, but those in a call of this replica's."""
        in_flight = set().union(*self._claimed_digests.values())
        return [
            (asked.pair, asker)
            for digest, asked in self._waiting_pairs.items()
            if digest not in in_flight
            for asker in asked.request_contexts()
        ]

    def complete_locally(self, claim: Claim, outcomes: Mapping[bytes, Outcome]) -> None:
        """Pairs of a claim ended, and Redis cannot be told yet."""
        self.resolve(outcomes)
        self._forget_claimed(claim, outcomes)

    def abandon_claim(self, claim: Claim) -> list[tuple[Pair, RequestContext]]:
        """The call is over, unanswered, and Redis cannot be told: what somebody here still waits for."""
        self._claimed_digests.pop(claim.id, None)
        claimed = {pair.digest for pair in claim.pairs}
        return [(pair, asker) for pair, asker in self.unclaimed_pairs() if pair.digest in claimed]

    def resolve(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Pairs have ended: tell whoever waits here."""
        for digest, outcome in outcomes.items():
            self._resolve_one(digest, outcome)

    def fail_all(self, error: PairError) -> None:
        """End all that somebody here waits for: the process is about to end."""
        self.resolve(dict.fromkeys(self._waiting_pairs, error))

    async def publish(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Tell all replicas how pairs ended that were never claimed, or whose claim is long over."""
        await self._publish("", outcomes, inferred=False)

    async def claim(self) -> Claim | ClaimDeferred:
        """See `Queue.claim`. Only a replica where somebody waits claims: others would only be in the way.

        But for those whose own calls fail.
        """
        now = time.monotonic()
        if not self._waiting_pairs and now >= self._assist_until:
            return ClaimDeferred(math.inf)
        if now < self._not_before:
            return ClaimDeferred(self._not_before - now)
        limits, claim_id, help_until = self._limits, self._new_id(), self._assist_until
        reply = await self._scripts.run(
            "claim",
            [
                self.replica,
                claim_id,
                limits.pairs_per_second * PACE,
                limits.calls_per_second * PACE,
                limits.batch_pairs,
                limits.batch_bytes,
                self._linger_ms,
                self._lease_ms,
                _CLAIM_AHEAD_MS,
                self.server_run_id,
                self._own_failure_age_ms(now),
            ],
        )
        if reply[0] == b"aside":
            self._not_before = now + reply[1] / 1000
            return ClaimDeferred(reply[1] / 1000)
        if reply[0] == b"wait":
            if reply[1] < 0 and self._assist_until == help_until:  # nothing waits, nor was published since
                self._assist_until = 0.0
            return ClaimDeferred(math.inf if reply[1] < 0 else max(reply[1] / 1000, 0.001))
        until_send_ms, until_slot_ms, packed, traces, request = reply[1:6]
        pairs = list(self._decode_pairs(unpack(packed)))
        # Redis's `now` lies somewhere between request and reply; two neighbours err alike.
        redis_now = now + (time.monotonic() - now) / 2
        send_at = redis_now + until_send_ms / 1000 if until_send_ms else now
        slot_at = redis_now + until_slot_ms / 1000
        claim = Claim(claim_id, pairs, send_at, slot_at, traces, request.decode("ascii", "replace"))
        self._claimed_digests[claim_id] = {pair.digest for pair in pairs}
        return claim

    def _own_failure_age_ms(self, now: float) -> int:
        """Return how long ago this replica's last call failed, -1 if it did not or others' would have too."""
        if not self._own_outage.defers_to_others:
            return -1
        aside_seconds = _MAX_DEFERRAL_SECONDS if self._own_outage.failures > 1 else _FIRST_DEFERRAL_SECONDS
        failed_ago = now - self._own_outage.failed_at
        return round(failed_ago * 1000) if failed_ago < aside_seconds else -1

    def _decode_pairs(self, batch: Iterable[tuple[bytes, bytes, bytes, float]]) -> Iterator[Pair]:
        """The pairs of a batch that can be read; the others nobody here could answer."""
        for digest, company, title, waited_ms in batch:
            try:
                pair = Pair(digest, company.decode(), title.decode())
            except UnicodeDecodeError:
                self._metrics.store_garbage.inc()
                continue
            self._metrics.slot_wait.observe(waited_ms / 1000)
            yield pair

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        moved: int = await self._scripts.run("postpone_slot", [claim.id, math.ceil(seconds * 1000)])
        return moved == 1

    async def release(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        await self._finish_claim(claim, "release", [])

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """See `Queue.fulfil`."""
        self.resolve(outcomes)  # whoever waits here need not wait for Redis
        if inferred:
            self._own_outage.reset()
        try:
            await self._publish(claim.id, outcomes, inferred=inferred)
        finally:
            self._forget_claimed(claim, outcomes)

    async def fail(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None = None,
        model_fault: bool = False,
        unsent: bool = False,
    ) -> None:
        """See `Queue.fail`. This replica's own failures defer its own claims; the fleet counts its own."""
        now, limits = time.monotonic(), self._limits
        spread = random.uniform(*BACKOFF_JITTER)  # noqa: S311
        self._own_outage.record_failure(
            error,
            sent_at=claim.send_at,
            now=now,
            pushback_seconds=retry_after_seconds,
            model_fault=model_fault,
            jitter=spread,
        )
        again = self._own_outage.not_before
        if (
            self._own_outage.defers_to_others and limits.calls_per_second and not unsent
        ):  # the limit allows no call before
            again = max(again, claim.slot_at + 1 / (limits.calls_per_second * PACE))
        self._not_before = again + _DEFER_SECONDS
        pushback_ms = -1 if retry_after_seconds is None else round(retry_after_seconds * 1000)
        arguments = [
            pushback_ms,
            pack(pack_error(error)),
            round(limits.retry_window_seconds * 1000),
            round(spread * MIN_BACKOFF_SECONDS * 1000),
            round(MAX_BACKOFF_SECONDS * 1000),
            round(MAX_MODEL_FAULT_BACKOFF_SECONDS * 1000),
            int(model_fault),
            int(unsent),
            MAX_FAILED_BATCHES,
            MAX_MODEL_FAULTS,
            MAX_REJECTIONS,
        ]
        await self._finish_claim(claim, "fail", arguments)

    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        """See `Queue.refuse`."""
        reasons = [[digest, pack_error(reason)] for digest, reason in errors_by_digest.items()]
        self._own_outage.reset()
        await self._finish_claim(
            claim, "reject", [pack(pack_error(error)), pack(reasons), MAX_REJECTIONS, self.replica]
        )

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:
        """See `ProxyQueue.overview`."""
        arguments = [minutes, MAX_REPORTS, MAX_REPORT_BYTES]
        return decode_snapshot(await self._scripts.run("snapshot", arguments))

    async def wait_for_change(self) -> None:
        """See `Queue.changed`."""
        await self._changed.wait()
        self._changed.clear()

    def apply_outcomes(
        self, levels: bytes, errors: Sequence[tuple[bytes, Any]], error_for_all: Any, backoff: Any = None
    ) -> None:
        """Take in what some replica published.

        `pause` is how long nobody calls a model target, in ms, and why. Another target is no concern of this
        replica's: it may send the pairs itself.
        """
        if backoff and backoff[2] == self._scripts.model_key.encode():
            milliseconds, error, _ = backoff
            seconds = float(milliseconds) / 1000
            if not 0 <= seconds <= _MAX_TIMEOUT_SECONDS:
                raise ValueError(milliseconds)
            self._on_model_backoff(time.monotonic() + seconds, self._decode_error(error))
        if not levels and not errors and not error_for_all:
            # The call that another replica cannot make may have taken a slot: the next one is as far away.
            self._assist_until = time.monotonic() + self._limits.slot_seconds + _HELP_SECONDS
            self._changed.set()
        for at in range(0, len(levels) - DIGEST_BYTES, _LEVEL_BYTES):
            level = levels[at + DIGEST_BYTES]
            if level in LEVELS:
                self._resolve_one(levels[at : at + DIGEST_BYTES], level)
        for digest, error in errors:
            self._resolve_one(digest, self._decode_error(error))
        if error_for_all:
            self.fail_all(self._decode_error(error_for_all))
        if self._waiting_pairs:
            # A batch's answers come in parts: until the last is here, all would ask for a call in vain.
            rest_seconds = _PARTIAL_PUBLISH_SECONDS if levels or errors else 0.0
            asyncio.get_running_loop().call_later(rest_seconds, self._changed.set)

    def _schedule_claim(self, seconds: float) -> None:
        """Ask for a call now (0), or when whoever queued what was only joined here should have had one."""
        if not seconds:
            self._changed.set()
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds + _JOINER_CLAIM_DELAY_SECONDS
        if self._claim_timer is not None:
            if self._claim_timer.when() <= due:
                return
            self._claim_timer.cancel()
        self._claim_timer = loop.call_at(due, self._on_claim_timer)

    def _on_claim_timer(self) -> None:
        self._claim_timer = None
        self._changed.set()

    def _forget_claimed(self, claim: Claim, digests: Iterable[bytes]) -> None:
        left = self._claimed_digests.get(claim.id)
        if left is not None:
            left.difference_update(digests)
            if not left:
                del self._claimed_digests[claim.id]

    def _count_waiting(self, priority: str) -> int:
        return sum(asked.priority == priority for asked in self._waiting_pairs.values())

    async def _publish(self, claim_id: str, outcomes: Mapping[bytes, Outcome], *, inferred: bool) -> None:
        for chunk in _chunks(list(outcomes.items())):
            levels = b"".join(key + bytes((level,)) for key, level in chunk if isinstance(level, int))
            errors = [[key, pack_error(error)] for key, error in chunk if isinstance(error, PairError)]
            await self._scripts.run(
                "complete",
                [
                    claim_id,
                    levels,
                    pack(errors),
                    round(INVALID_RESPONSE_TTL_SECONDS * 1000),
                    int(inferred),
                    self.replica,
                ],
            )

    def _resolve_one(self, digest: bytes, outcome: Outcome) -> None:
        self._waiting_pairs.pop(digest, None)
        self._on_outcome(digest, outcome)

    async def _finish_claim(self, claim: Claim, script: str, arguments: Sequence[Any]) -> None:
        """The last word on a claim. It stays listed until that is heard, so that it is not given away."""
        try:
            await self._scripts.run(script, [claim.id, *arguments])
        finally:
            self._claimed_digests.pop(claim.id, None)
            self._changed.set()

    async def _enqueue_chunk(
        self,
        pairs: Sequence[Pair],
        context: RequestContext,
        request_id: str,
        following: tuple[int, int],
        *,
        is_re_enqueue: bool,
    ) -> tuple[bytes, list[Any], float]:
        """One byte a pair, the errors of those that failed, and when to see to a call (see `enqueue.lua`)."""
        if not pairs:
            return b"", [], 0.0
        patience_seconds = max(0.0, context.deadline - asyncio.get_running_loop().time())
        patience_ms = round(min(patience_seconds, _MAX_TIMEOUT_SECONDS) * 1000)
        request = [
            context.caller,
            context.priority,
            patience_ms,
            *following,
            request_id,
            int(is_re_enqueue),
            [[pair.digest, pair.company, pair.title, pair.size_bytes] for pair in pairs],
            context.trace_context,
        ]
        quota = self._quota_for(context)
        if quota is not None:
            request.append([quota.account, quota.pairs_per_second * PACE, quota.queued_pairs])
        reply = await self._batcher.submit(request)
        if reply[0] == b"ok":
            return reply[1], reply[2], reply[3] / 1000
        wait_seconds = reply[1] / 1000
        if reply[0] == b"down":
            raise self._model_down_error(reply[2], wait_seconds)
        raise _rejection_error(
            reply,
            quota,
            limits=self._limits,
            pairs=len(pairs) + following[0],
            timeout_seconds=patience_seconds,
        )

    async def _enqueue_batch(self, requests: Sequence[list[Any]]) -> Sequence[Any]:
        limits = self._limits
        arguments = [
            self.replica,
            limits.max_pairs,
            limits.max_bytes,
            limits.batch_pairs,
            round(limits.retry_window_seconds * 1000),
            pack(requests),
        ]
        async with self._interest_lock:
            replies = unpack(await self._scripts.run("enqueue", arguments))
        if len(replies) != len(requests):
            message = f"the queue answered {len(replies)} of {len(requests)} requests"
            raise StoreError(message)
        return replies  # type: ignore[no-any-return]

    def _partition_replies(
        self,
        pairs: Sequence[Pair],
        states: bytes,
        errors: list[Any],
        outcomes: dict[bytes, Outcome],
        queued: set[bytes],
    ) -> None:
        failed = iter(errors)
        for pair, state in zip(pairs, states, strict=True):
            if state == _STATE_FAILED:
                outcomes[pair.digest] = self._decode_error(next(failed, None))
            elif state in LEVELS:
                outcomes[pair.digest] = state
            elif state == _STATE_QUEUED:
                queued.add(pair.digest)

    def _model_down_error(self, reason: Any, wait_seconds: float) -> ModelUnavailableError:
        """Return the error of a request that is refused while the model is down: why its last call failed."""
        error = self._decode_error(reason) if reason else None
        if not isinstance(error, ModelUnavailableError):
            error = ModelUnavailableError("the model is down", 0.0)
        error.retry_after_seconds = max(_MIN_PUSHBACK_SECONDS, wait_seconds)
        return error

    def _decode_error(self, packed: Any) -> PairError:
        """Return the error that some replica packed. What cannot be read is counted, and may be retried."""
        try:
            return unpack_error(packed)
        except StoreError as error:
            self._metrics.store_garbage.inc()
            return ModelUnavailableError(f"the pair failed, and {error}", _UNREADABLE_RETRY_SECONDS)

    def _new_id(self) -> str:
        return f"{self.replica}.{next(self._ids)}"


def _rejection_error(
    reply: Any, quota: Quota | None, *, limits: QueueLimits, pairs: int, timeout_seconds: float
) -> QueueFullError:
    why, wait_seconds = reply[0], reply[1] / 1000
    if why == b"full":
        held, unit = reply[2].decode().split(" ")
        most = limits.max_pairs if unit == "pairs" else limits.max_bytes
        return rejections.queue_full_error(int(held), unit, max_held=most, wait_seconds=wait_seconds)
    if why == b"queued" and quota is not None:
        return rejections.queued_pairs_quota_error(
            quota, waiting=int(reply[2]), pairs=pairs, wait_seconds=wait_seconds
        )
    if why == b"slow" and quota is not None:
        return rejections.pairs_rate_quota_error(
            quota, wait_seconds=wait_seconds, left_seconds=timeout_seconds
        )
    return rejections.deadline_error(wait_seconds=wait_seconds, left_seconds=timeout_seconds)


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), _CHUNK_PAIRS):
        yield items[start : start + _CHUNK_PAIRS]


def _weighted_chunks(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """The pairs in chunks whose texts are as bounded as their number."""
    start, size = 0, 0
    for at, pair in enumerate(pairs):
        weight = _pair_weight(pair.size_bytes)
        if at > start and size + weight > _CHUNK_PAIRS:
            yield pairs[start:at]
            start, size = at, 0
        size += weight
    if pairs:
        yield pairs[start:]


def _pair_weight(size_bytes: int) -> int:
    return 1 + size_bytes // _BYTES_PER_EXTRA_WEIGHT
