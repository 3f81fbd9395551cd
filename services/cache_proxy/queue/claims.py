"""The batches that this replica claims from the shared queue, until their calls to the model end.

The module has more than 250 lines: all ways in which a claim ends change the same table of claims.
"""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from services.cache_proxy.domain import PACE, Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.call_deferral import CallDeferral
from services.cache_proxy.queue.change_signal import ChangeSignal
from services.cache_proxy.queue.chunks import CHUNK_PAIRS
from services.cache_proxy.queue.interest import InterestTable
from services.cache_proxy.queue.interface import (
    INVALID_RESPONSE_TTL_SECONDS,
    MAX_FAILED_BATCHES,
    MAX_REJECTIONS,
    Claim,
    ClaimDeferred,
    QueueLimits,
)
from services.cache_proxy.queue.outage import (
    BACKOFF_JITTER,
    MAX_BACKOFF_SECONDS,
    MAX_MODEL_FAULT_BACKOFF_SECONDS,
    MAX_MODEL_FAULTS,
    MIN_BACKOFF_SECONDS,
)
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.serialization import pack, pack_error, unpack

_LEASE_MARGIN_SECONDS = 5.0
_CLAIM_AHEAD_MS = 60

# The scripts and the event loop's timers both count whole milliseconds, and each rounds up.
_TIMER_ROUNDING_MS = 2

# After the slot that a failed call of another replica may have taken.
_ASSIST_SECONDS = 1.0


class SharedClaims:
    """Claims of this replica in Redis.

    State, touched only from the event loop:

    - `_unfinished`: the pairs of each claim that have not ended yet.
    - `deferral`: this replica's own failed calls, after which it leaves the next ones to other replicas.
    - `_assist_until`: until then this replica claims although no request waits here, because another replica
      failed to make its call.
    - `server_run_id`: the run id of the Redis server that the last heartbeat reached.
    """

    def __init__(
        self,
        scripts: Scripts,
        *,
        replica: str,
        limits: QueueLimits,
        lease_seconds: float,
        interest: InterestTable,
        metrics: ProxyMetrics,
        changed: ChangeSignal,
        new_id: Callable[[], str],
    ) -> None:
        self._scripts = scripts
        self._replica = replica
        self._limits = limits
        self._linger_ms = max(0, round(limits.linger_seconds * 1000) - _TIMER_ROUNDING_MS)
        self._lease_ms = round((lease_seconds + _LEASE_MARGIN_SECONDS) * 1000)
        self._interest = interest
        self._metrics = metrics
        self._changed = changed
        self._new_id = new_id
        self._unfinished: dict[str, set[bytes]] = {}
        self._assist_until = 0.0
        self.deferral = CallDeferral(limits)
        self.server_run_id = ""

    @property
    def ids(self) -> list[str]:
        """Return the ids of the claims in work here."""
        return list(self._unfinished)

    @property
    def digests(self) -> set[bytes]:
        """Return the pairs in calls of this replica that have not ended."""
        return set().union(*self._unfinished.values())

    def assist(self) -> None:
        """Claim for a replica whose call failed, even if no request waits here.

        The failed call may have taken a slot, so this lasts until after the next one.
        """
        self._assist_until = time.monotonic() + self._limits.slot_seconds + _ASSIST_SECONDS
        self._changed.notify()

    async def claim(self) -> Claim | ClaimDeferred:
        """Claim the next batch. See `Queue.claim`.

        Only replicas with waiting requests claim, or ones that assist: others would only add load to Redis.
        """
        now = time.monotonic()
        if not self._interest and now >= self._assist_until:
            return ClaimDeferred(math.inf)
        if now < self.deferral.not_before:
            return ClaimDeferred(self.deferral.not_before - now)
        limits = self._limits
        claim_id = self._new_id()
        assist_until = self._assist_until
        arguments = [
            self._replica,
            claim_id,
            limits.pairs_per_second * PACE,
            limits.calls_per_second * PACE,
            limits.batch_pairs,
            limits.batch_bytes,
            self._linger_ms,
            self._lease_ms,
            _CLAIM_AHEAD_MS,
            self.server_run_id,
            self.deferral.failure_age_ms(now),
        ]
        reply = await self._scripts.run("claim", arguments)
        if reply[0] == b"aside":
            # Other replicas' calls are answered and this one's fail: it leaves them the next slots.
            self.deferral.not_before = now + reply[1] / 1000
            return ClaimDeferred(reply[1] / 1000)
        if reply[0] == b"wait":
            # The queue is empty, and no replica needed assistance while the script ran.
            if reply[1] < 0 and self._assist_until == assist_until:
                self._assist_until = 0.0
            return ClaimDeferred(math.inf if reply[1] < 0 else max(reply[1] / 1000, 0.001))
        return self._decode_claim(claim_id, reply, requested_at=now)

    def _decode_claim(self, claim_id: str, reply: Sequence[Any], *, requested_at: float) -> Claim:
        """Return the claim of a `claim.lua` reply, with its times on this process's clock.

        Redis's clock was read between request and reply. The middle is taken: the error of two claims that
        follow each other is about the same, so their distance is right.
        """
        until_send_ms, until_slot_ms, packed, trace_contexts, request_id = reply[1:6]
        pairs = list(self._decode_pairs(unpack(packed)))
        redis_now = requested_at + (time.monotonic() - requested_at) / 2
        claim = Claim(
            claim_id,
            pairs,
            send_at=redis_now + until_send_ms / 1000 if until_send_ms else requested_at,
            slot_at=redis_now + until_slot_ms / 1000,
            trace_contexts=trace_contexts,
            request_id=request_id.decode("ascii", "replace"),
        )
        self._unfinished[claim_id] = {pair.digest for pair in pairs}
        return claim

    def _decode_pairs(self, batch: Iterable[tuple[bytes, bytes, bytes, float]]) -> Iterator[Pair]:
        """Yield the pairs of a batch. One whose text is not UTF-8 is counted and left out."""
        for digest, company, title, waited_ms in batch:
            try:
                pair = Pair(digest, company.decode(), title.decode())
            except UnicodeDecodeError:
                self._metrics.store_garbage.inc()
                continue
            self._metrics.slot_wait.observe(waited_ms / 1000)
            yield pair

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """Report that a batch leaves late. See `Queue.postpone_slot`."""
        moved: int = await self._scripts.run("postpone_slot", [claim.id, math.ceil(seconds * 1000)])
        return moved == 1

    async def release(self, claim: Claim) -> None:
        """Give back a claim whose batch was not sent. See `Queue.release`."""
        await self._finish(claim, "release", [])

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """End pairs of a claim, here at once and then in Redis. See `Queue.complete`."""
        self._interest.resolve_all(outcomes)
        if inferred:
            self.deferral.reset()
        try:
            await self._publish(claim.id, outcomes, inferred=inferred)
        finally:
            self._forget(claim, outcomes)

    def complete_locally(self, claim: Claim, outcomes: Mapping[bytes, Outcome]) -> None:
        """End pairs of a claim while Redis cannot be reached."""
        self._interest.resolve_all(outcomes)
        self._forget(claim, outcomes)

    def abandon(self, claim: Claim) -> None:
        """Forget a claim whose call ended without outcomes while Redis cannot be reached."""
        self._unfinished.pop(claim.id, None)

    async def publish(self, outcomes: Mapping[bytes, Outcome]) -> None:
        """Publish outcomes of pairs that were never claimed in Redis, or whose claim has long ended."""
        await self._publish("", outcomes, inferred=False)

    async def fail(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None = None,
        model_fault: bool = False,
        unsent: bool = False,
    ) -> None:
        """Report a failed call. See `Queue.fail`.

        The failure defers this replica's own claims; the script counts the failures of all replicas.
        """
        limits = self._limits
        jitter = random.uniform(*BACKOFF_JITTER)  # noqa: S311
        self.deferral.record_failure(
            claim,
            error,
            retry_after_seconds=retry_after_seconds,
            model_fault=model_fault,
            unsent=unsent,
            jitter=jitter,
        )
        pushback_ms = -1 if retry_after_seconds is None else round(retry_after_seconds * 1000)
        arguments = [
            pushback_ms,
            pack(pack_error(error)),
            round(limits.retry_window_seconds * 1000),
            round(jitter * MIN_BACKOFF_SECONDS * 1000),
            round(MAX_BACKOFF_SECONDS * 1000),
            round(MAX_MODEL_FAULT_BACKOFF_SECONDS * 1000),
            int(model_fault),
            int(unsent),
            MAX_FAILED_BATCHES,
            MAX_MODEL_FAULTS,
            MAX_REJECTIONS,
        ]
        await self._finish(claim, "fail", arguments)

    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        """Report that the model rejected a batch. See `Queue.reject`."""
        named = [[digest, pack_error(reason)] for digest, reason in errors_by_digest.items()]
        self.deferral.reset()
        arguments = [pack(pack_error(error)), pack(named), MAX_REJECTIONS, self._replica]
        await self._finish(claim, "reject", arguments)

    async def _publish(self, claim_id: str, outcomes: Mapping[bytes, Outcome], *, inferred: bool) -> None:
        """End pairs in Redis, chunk by chunk, and publish their outcomes to all replicas."""
        items = list(outcomes.items())
        for start in range(0, len(items), CHUNK_PAIRS):
            chunk = items[start : start + CHUNK_PAIRS]
            levels = b"".join(digest + bytes((level,)) for digest, level in chunk if isinstance(level, int))
            errors = [[digest, pack_error(error)] for digest, error in chunk if isinstance(error, PairError)]
            arguments = [
                claim_id,
                levels,
                pack(errors),
                round(INVALID_RESPONSE_TTL_SECONDS * 1000),
                int(inferred),
                self._replica,
            ]
            await self._scripts.run("complete", arguments)

    async def _finish(self, claim: Claim, script: str, arguments: Sequence[Any]) -> None:
        """Run the script that ends a claim.

        The claim stays listed until the reply: heartbeats name the listed claims, and Redis takes back any
        claim that is not among them.
        """
        try:
            await self._scripts.run(script, [claim.id, *arguments])
        finally:
            self._unfinished.pop(claim.id, None)
            self._changed.notify()

    def _forget(self, claim: Claim, digests: Iterable[bytes]) -> None:
        """Remove ended pairs from a claim, and the claim once all of them have ended."""
        unfinished = self._unfinished.get(claim.id)
        if unfinished is not None:
            unfinished.difference_update(digests)
            if not unfinished:
                del self._unfinished[claim.id]
