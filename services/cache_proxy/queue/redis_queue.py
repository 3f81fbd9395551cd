"""The miss queue that all replicas share in Redis, as one replica sees it."""

import asyncio
import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from services.cache_proxy.domain import DIGEST_BYTES, PRIORITY_CLASSES, Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.change_signal import ChangeSignal
from services.cache_proxy.queue.claims import SharedClaims
from services.cache_proxy.queue.enqueuer import Enqueuer
from services.cache_proxy.queue.interest import InterestTable
from services.cache_proxy.queue.interface import (
    Claim,
    ClaimDeferred,
    EnqueueResult,
    ModelBackoffCallback,
    OutcomeCallback,
    Queue,
    QueueLimits,
    RequestContext,
)
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.quotas import QuotaProvider, no_quotas
from services.cache_proxy.queue.serialization import unpack_error_or_unavailable
from services.cache_proxy.queue.snapshot import MAX_REPORT_BYTES, MAX_REPORTS, QueueSnapshot, decode_snapshot
from services.common.compat import override
from services.common.levels import LEVELS

# For two chunks of a batch to be published, on a machine with little CPU time to spare.
_PARTIAL_PUBLISH_SECONDS = 0.06

# A published level is the pair's digest and one byte.
_PUBLISHED_LEVEL_BYTES = DIGEST_BYTES + 1

_MAX_BACKOFF_SECONDS = 86_400.0


class RedisQueue(Queue):
    """The shared queue, put together from the parts of its state at this replica.

    - `interest`: the pairs for which requests wait here.
    - `claims`: the batches in calls of this replica.

    A lost message is repaired soon: messages are numbered, and each heartbeat brings the last number (see
    `replica_session.py`). All methods run on the event loop.
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
        self.replica = replica
        self._scripts = scripts
        self._on_model_backoff = on_model_backoff
        self._metrics = metrics
        self._ids = itertools.count(1)
        self._changed = ChangeSignal()
        self.interest = InterestTable(on_outcome=on_outcome, quotas=quotas)
        self._enqueuer = Enqueuer(
            scripts,
            replica=replica,
            limits=limits,
            interest=self.interest,
            metrics=metrics,
            changed=self._changed,
            new_id=self._new_id,
        )
        self.claims = SharedClaims(
            scripts,
            replica=replica,
            limits=limits,
            lease_seconds=lease_seconds,
            interest=self.interest,
            metrics=metrics,
            changed=self._changed,
            new_id=self._new_id,
        )
        for priority in PRIORITY_CLASSES:
            metrics.queue_pairs.labels(priority).set_function(partial(self.interest.count, priority))

    @property
    @override
    def store_before_complete(self) -> bool:
        # A Cluster has the buckets of the cache on all nodes, and the queue on one.
        return self._scripts.on_cluster

    @override
    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        return await self._enqueuer.enqueue(pairs, context)

    async def re_enqueue(self, *, exclude: Collection[bytes] = ()) -> None:
        """Enqueue all waiting pairs again but the excluded ones. It changes nothing where none was lost."""
        await self._enqueuer.re_enqueue(exclude=exclude)

    @override
    async def cancel(self, digests: Sequence[bytes], *, notify_redis: bool = True) -> None:
        await self._enqueuer.cancel(digests, notify_redis=notify_redis)

    @override
    async def claim(self) -> Claim | ClaimDeferred:
        return await self.claims.claim()

    @override
    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        return await self.claims.postpone_slot(claim, seconds=seconds)

    @override
    async def release(self, claim: Claim) -> None:
        await self.claims.release(claim)

    @override
    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        await self.claims.complete(claim, outcomes, inferred=inferred)

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
        await self.claims.fail(
            claim,
            error,
            retry_after_seconds=retry_after_seconds,
            model_fault=model_fault,
            unsent=unsent,
        )

    @override
    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        await self.claims.reject(claim, error, errors_by_digest)

    async def snapshot(self, *, minutes: int) -> QueueSnapshot:
        """Return the state of the queue of all replicas. See `ManagedQueue.snapshot`."""
        arguments = [minutes, MAX_REPORTS, MAX_REPORT_BYTES]
        return decode_snapshot(await self._scripts.run("snapshot", arguments))

    @override
    async def wait_for_change(self) -> None:
        await self._changed.wait()

    def unclaimed_pairs(self) -> list[tuple[Pair, RequestContext]]:
        """Return the waiting pairs, once for each requester, but not those in calls of this replica."""
        return self.interest.contexts(exclude=self.claims.digests)

    def abandon_claim(self, claim: Claim) -> list[tuple[Pair, RequestContext]]:
        """Forget a claim whose call ended without outcomes while Redis cannot be reached.

        Return its pairs for which requests still wait here, once for each requester.
        """
        self.claims.abandon(claim)
        claimed = {pair.digest for pair in claim.pairs}
        return [(pair, context) for pair, context in self.unclaimed_pairs() if pair.digest in claimed]

    def apply_outcomes(
        self, levels: bytes, errors: Sequence[tuple[bytes, Any]], error_for_all: Any, backoff: Any = None
    ) -> None:
        """Apply what some replica published.

        - `levels`: digest and level of each pair that has a level, one after the other.
        - `errors`: digest and packed error of each pair that has none.
        - `error_for_all`: a packed error with which every waiting pair ends, if the model is down.
        - `backoff`: for how many ms no replica calls a model target, the packed error why, and the target.
          For another target than this replica's it is ignored: this replica may send the pairs itself.

        A message with none of the first three means that a replica could not make its call. Raises
        `ValueError`, `TypeError` or `IndexError` if the message cannot be read.
        """
        if backoff and backoff[2] == self._scripts.model_key.encode():
            milliseconds, error, _ = backoff
            seconds = float(milliseconds) / 1000
            if not 0 <= seconds <= _MAX_BACKOFF_SECONDS:
                raise ValueError(milliseconds)
            self._on_model_backoff(time.monotonic() + seconds, self._unpack_error(error))
        if not levels and not errors and not error_for_all:
            self.claims.assist()
        for start in range(0, len(levels) - DIGEST_BYTES, _PUBLISHED_LEVEL_BYTES):
            level = levels[start + DIGEST_BYTES]
            if level in LEVELS:
                self.interest.resolve(levels[start : start + DIGEST_BYTES], level)
        for digest, error in errors:
            self.interest.resolve(digest, self._unpack_error(error))
        if error_for_all:
            self.interest.fail_all(self._unpack_error(error_for_all))
        # A batch's outcomes are published in chunks. Until the last one is here, all replicas would try to
        # claim in vain.
        if self.interest:
            delay_seconds = _PARTIAL_PUBLISH_SECONDS if levels or errors else 0.0
            asyncio.get_running_loop().call_later(delay_seconds, self._changed.notify)

    def _unpack_error(self, packed: Any) -> PairError:
        return unpack_error_or_unavailable(packed, self._metrics)

    def _new_id(self) -> str:
        return f"{self.replica}.{next(self._ids)}"
