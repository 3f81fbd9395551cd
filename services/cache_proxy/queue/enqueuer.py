"""Enqueues this replica's pairs in the shared queue, and cancels them there.

The module has more than 250 lines: enqueueing, repeating it and cancelling share the lock that orders their
scripts, and the form of one script's requests and replies.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from services.cache_proxy.batching import MicroBatcher
from services.cache_proxy.domain import PACE, Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, QueueFullError, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue import rejections
from services.cache_proxy.queue.change_signal import ChangeSignal
from services.cache_proxy.queue.chunks import CHUNK_PAIRS, pair_weight, weighted_chunks
from services.cache_proxy.queue.interest import InterestTable
from services.cache_proxy.queue.interface import EnqueueResult, QueueLimits, RequestContext
from services.cache_proxy.queue.queue_scripts import Scripts
from services.cache_proxy.queue.serialization import pack, unpack, unpack_error_or_unavailable
from services.common.levels import LEVELS

# The state of a pair in the reply of `enqueue.lua`. 1 to 7 is its level, and 17 an interest that was joined.
_STATE_QUEUED = 16
_STATE_FAILED = 18

# The replica that queued a pair claims it, unless it was stopped or paused meanwhile. A replica that only
# joined the pair leaves it this much time.
_JOINER_CLAIM_DELAY_SECONDS = 0.5

_MAX_TIMEOUT_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class _ChunkRequest:
    """One request of an `enqueue` script call: the array that the script reads, and its weight in pairs."""

    fields: list[Any]
    weight: int


@dataclass(frozen=True, slots=True)
class _ChunkReply:
    """What became of a chunk's pairs: a state for each, and the errors of those that failed.

    `claim_delay_seconds` is when to look for a claim: 0 now, else when the replica that queued what this one
    only joined should have claimed it.
    """

    states: bytes
    errors: list[Any]
    claim_delay_seconds: float


class Enqueuer:
    """Keeps the shared queue's copy of this replica's interest.

    State: none but `_interest_lock`, which is held while a script adds or cancels interest. So Redis sees
    both in the order in which they were decided here: otherwise a slow cancellation could undo the `enqueue`
    that followed it.
    """

    def __init__(
        self,
        scripts: Scripts,
        *,
        replica: str,
        limits: QueueLimits,
        interest: InterestTable,
        metrics: ProxyMetrics,
        changed: ChangeSignal,
        new_id: Callable[[], str],
    ) -> None:
        self._scripts = scripts
        self._replica = replica
        self._limits = limits
        self._interest = interest
        self._metrics = metrics
        self._changed = changed
        self._new_id = new_id
        self._batcher = MicroBatcher(
            self._run_script, size=lambda request: request.weight, max_size=CHUNK_PAIRS
        )
        self._interest_lock = asyncio.Lock()

    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        """Enqueue a request's pairs, chunk by chunk. See `Queue.enqueue`."""
        new_digests = self._interest.register(pairs, context)
        request_id = context.request_id or self._new_id()
        outcomes: dict[bytes, Outcome] = {}
        queued: set[bytes] = set()
        claim_delays: list[float] = []
        enqueued_pairs = 0
        remaining_bytes = sum(pair.size_bytes for pair in pairs)
        try:
            for chunk in weighted_chunks(pairs):
                remaining_bytes -= sum(pair.size_bytes for pair in chunk)
                reply = await self._submit(
                    chunk,
                    context,
                    request_id,
                    following_pairs=len(pairs) - enqueued_pairs - len(chunk),
                    following_bytes=remaining_bytes,
                )
                self._sort_states(chunk, reply, outcomes, queued)
                self._interest.add_requester(chunk, context)
                claim_delays.append(reply.claim_delay_seconds)
                enqueued_pairs += len(chunk)
                # A whole batch waits. The chunks that follow may take seconds, so its claim does not wait.
                if not reply.claim_delay_seconds and enqueued_pairs >= self._limits.batch_pairs:
                    self._changed.notify()
        except (QueueFullError, ModelUnavailableError):
            await self._withdraw(new_digests, {pair.digest for pair in pairs[:enqueued_pairs]})
            raise
        except BaseException:
            # The reply was lost or the request cancelled. Its pairs may have been queued all the same.
            self._changed.notify()
            raise
        self._interest.apply_known_outcomes(outcomes, new_digests=new_digests)
        if claim_delays:
            delay_seconds = min(claim_delays)
            # Pairs that were queued here are claimed at once, joined ones when their replica should have.
            if delay_seconds:
                self._changed.notify_after(delay_seconds + _JOINER_CLAIM_DELAY_SECONDS)
            else:
                self._changed.notify()
        return EnqueueResult(outcomes, frozenset(queued))

    async def _withdraw(self, new_digests: Collection[bytes], in_redis: Collection[bytes]) -> None:
        """Remove what a rejected request added, except pairs that other requests joined meanwhile.

        `in_redis` are the pairs before the first new one: they joined pairs of other replicas before the
        request was rejected, so Redis must drop this replica's interest in them.
        """
        own = self._interest.unshared(new_digests)
        self._interest.remove([digest for digest in own if digest not in in_redis])
        await self.cancel([digest for digest in own if digest in in_redis])

    async def re_enqueue(self, *, exclude: Collection[bytes] = ()) -> None:
        """Enqueue all waiting pairs again, which repairs a lost message and a lost queue.

        Callers may be many with few pairs each, so the chunks of several callers share a script call.
        """
        chunks: list[tuple[Sequence[Pair], RequestContext]] = []
        weight = 0
        for context, pairs in self._interest.grouped(exclude=exclude):
            for chunk in weighted_chunks(pairs):
                chunks.append((chunk, context))
                weight += sum(pair_weight(pair.size_bytes) for pair in chunk)
                if weight >= CHUNK_PAIRS:
                    await self._re_enqueue_chunks(chunks)
                    chunks = []
                    weight = 0
        await self._re_enqueue_chunks(chunks)
        self._changed.notify()

    async def _re_enqueue_chunks(self, chunks: Iterable[tuple[Sequence[Pair], RequestContext]]) -> None:
        calls = (self._re_enqueue_chunk(pairs, context) for pairs, context in chunks)
        for failure in await asyncio.gather(*calls, return_exceptions=True):
            if failure is not None:
                raise failure

    async def _re_enqueue_chunk(self, chunk: Sequence[Pair], context: RequestContext) -> None:
        pairs = [pair for pair in chunk if pair.digest in self._interest]
        reply = await self._submit(pairs, context, self._new_id(), is_re_enqueue=True)
        outcomes: dict[bytes, Outcome] = {}
        self._sort_states(pairs, reply, outcomes, set())
        self._interest.resolve_all(
            {digest: outcome for digest, outcome in outcomes.items() if digest in self._interest}
        )
        # Requests that were cancelled while the script ran have left their pairs in Redis.
        await self._cancel_interest([pair.digest for pair in pairs if pair.digest not in outcomes])

    async def cancel(self, digests: Sequence[bytes], *, notify_redis: bool = True) -> None:
        """Remove pairs for which no request waits here any more, in Redis only if it can be reached."""
        removed = self._interest.remove(digests)
        for start in range(0, len(removed) if notify_redis else 0, CHUNK_PAIRS):
            await self._cancel_interest(removed[start : start + CHUNK_PAIRS])

    async def _cancel_interest(self, digests: Sequence[bytes]) -> None:
        if all(digest in self._interest for digest in digests):
            return
        async with self._interest_lock:
            # While this waited for the lock, another request may have registered some of them.
            removed = [digest for digest in digests if digest not in self._interest]
            if removed:
                arguments = [self._replica, b"".join(removed), int(not self._interest)]
                await self._scripts.run("cancel", arguments)

    async def _submit(
        self,
        pairs: Sequence[Pair],
        context: RequestContext,
        request_id: str,
        *,
        following_pairs: int = 0,
        following_bytes: int = 0,
        is_re_enqueue: bool = False,
    ) -> _ChunkReply:
        """Enqueue one chunk, in a script call with chunks of other requests (see `enqueue.lua`).

        `following_pairs` and `following_bytes` are those of the request's later chunks: a request is admitted
        as a whole. Raises `QueueFullError`, `ModelUnavailableError` or `StoreError`.
        """
        if not pairs:
            return _ChunkReply(b"", [], 0.0)
        timeout_seconds = max(0.0, context.deadline - asyncio.get_running_loop().time())
        timeout_ms = round(min(timeout_seconds, _MAX_TIMEOUT_SECONDS) * 1000)
        sizes = [pair.size_bytes for pair in pairs]
        records = [
            [pair.digest, pair.company, pair.title, size_bytes]
            for pair, size_bytes in zip(pairs, sizes, strict=True)
        ]
        fields = [
            context.caller,
            context.priority,
            timeout_ms,
            following_pairs,
            following_bytes,
            request_id,
            int(is_re_enqueue),
            records,
            context.trace_context,
        ]
        quota = self._interest.quota_for(context)
        if quota is not None:
            fields.append([quota.account, quota.pairs_per_second * PACE, quota.queued_pairs])
        reply = await self._batcher.submit(_ChunkRequest(fields, sum(map(pair_weight, sizes))))
        if reply[0] == b"ok":
            return _ChunkReply(reply[1], reply[2], reply[3] / 1000)
        if reply[0] == b"down":
            reason = unpack_error_or_unavailable(reply[2], self._metrics) if reply[2] else None
            raise rejections.model_down_error(reason, wait_seconds=reply[1] / 1000)
        raise rejections.decode_rejection(
            reply,
            quota,
            limits=self._limits,
            pairs=len(pairs) + following_pairs,
            timeout_seconds=timeout_seconds,
        )

    async def _run_script(self, requests: Sequence[_ChunkRequest]) -> Sequence[Any]:
        limits = self._limits
        arguments = [
            self._replica,
            limits.max_pairs,
            limits.max_bytes,
            limits.batch_pairs,
            round(limits.retry_window_seconds * 1000),
            pack([request.fields for request in requests]),
        ]
        async with self._interest_lock:
            replies = unpack(await self._scripts.run("enqueue", arguments))
        if len(replies) != len(requests):
            message = f"the queue answered {len(replies)} of {len(requests)} requests"
            raise StoreError(message)
        return replies  # type: ignore[no-any-return]

    def _sort_states(
        self,
        pairs: Sequence[Pair],
        reply: _ChunkReply,
        outcomes: dict[bytes, Outcome],
        queued: set[bytes],
    ) -> None:
        """Add the pairs that have ended to `outcomes`, and those that this request queued to `queued`."""
        errors = iter(reply.errors)
        for pair, state in zip(pairs, reply.states, strict=True):
            if state == _STATE_FAILED:
                outcomes[pair.digest] = unpack_error_or_unavailable(next(errors, None), self._metrics)
            elif state in LEVELS:
                outcomes[pair.digest] = state
            elif state == _STATE_QUEUED:
                queued.add(pair.digest)
