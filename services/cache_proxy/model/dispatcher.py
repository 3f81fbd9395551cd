"""From the queue to the model and back: claims batches, sends them, ends or returns their pairs."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import grpc

from services.cache_proxy.cache.resilient_store import GuardedStore
from services.cache_proxy.errors import BatchRefused, CallFailed, Refused, Unavailable
from services.cache_proxy.model.client import REFUSED_PAIR, ModelClient
from services.cache_proxy.queue.interface import LATE_SECONDS, Claim, Outcome, Pair, Queue
from services.common.tasks import end
from services.common.tracing import NO_SPAN, OFF, Span, Tracing

_log = logging.getLogger(__name__)

# Not an outage but an exception in the model: a pair may be what it cannot bear.
_BREAKDOWNS = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS})
_MAX_CALLS_IN_FLIGHT = 128
_RECHECK_SECONDS = 0.010


class Dispatcher:
    """One loop that claims, one task for each call in flight."""

    def __init__(
        self, *, queue: Queue, model: ModelClient, store: GuardedStore, replica: str = "",
        tracing: Tracing = OFF,
    ) -> None:  # fmt: skip
        self._queue = queue
        self._model = model
        self._store = store
        self._replica = replica
        self._tracing = tracing
        self._calls: set[asyncio.Task[None]] = set()
        self._looks: set[asyncio.Future[Sequence[int]]] = set()
        self._room = asyncio.Semaphore(_MAX_CALLS_IN_FLIGHT)
        self._failures_in_a_row = 0
        self._failed_at = -math.inf  # when the last of them was noticed

    async def run(self) -> None:
        """Claim and send until cancelled; calls in flight go on until `finish`."""
        while True:
            await self._room.acquire()
            decision = await self._queue.claim()
            if isinstance(decision, Claim):
                left = asyncio.Event()
                call = asyncio.create_task(self._do(decision, left))
                self._calls.add(call)
                call.add_done_callback(self._ended)
                # One batch is made ready at a time: those claimed meanwhile would be late by all that goes
                # before them, go back, and be claimed again.
                await left.wait()
                continue
            self._room.release()
            wait = None if math.isinf(decision.wait_seconds) else decision.wait_seconds
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._queue.changed(), wait)

    async def finish(self, *, within_seconds: float) -> None:
        """Wait for the calls in flight, so that no answer that the model gave is thrown away."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=within_seconds)
        await end(self._calls)

    def _ended(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._room.release()

    async def _do(self, claim: Claim, left: asyncio.Event) -> None:
        """From a claim to its end; `left` is set as soon as the batch is on its way, or will not go."""
        outcome = ""
        try:
            with self._traced(claim) as span:
                outcome = await self._send(claim, left)
                span.note(outcome=outcome)
        except Exception:  # noqa: BLE001 - the claim is over by then, or nothing here can end it
            _log.exception("a call to the model ended (%s), and what follows failed", outcome or "unknown")

    @contextlib.contextmanager
    def _traced(self, claim: Claim) -> Iterator[Span]:
        """Trace the block. Tracing that fails is logged, and costs no batch its call."""
        with contextlib.ExitStack() as stack:
            try:
                span = stack.enter_context(
                    self._tracing.batch(
                        "model.batch", claim.traces, pairs=len(claim.pairs), replica=self._replica
                    )
                )
            except Exception:  # noqa: BLE001 - whatever a tracing library raises
                _log.exception("a call to the model cannot be traced")
                span = NO_SPAN
            yield span

    async def _send(self, claim: Claim, left: asyncio.Event) -> str:
        """See `_do`; what came of it, in a word."""
        sent: Sequence[Pair] = ()
        asked_at = time.monotonic()
        try:
            sent = await self._unanswered(claim)
            batch = self._model.prepare(sent)
            await asyncio.sleep(claim.send_at - time.monotonic())
            told = await self._tell_late(claim) if sent else None
            if told is None:
                await self._queue.put_back(claim)
                return "put back"
            answering = await self._model.send(batch)
            try:
                await self._tell_late(claim, told_seconds=told)  # it has left, perhaps later after all
                left.set()
                answers = await answering
            finally:
                answering.cancel()
        except BatchRefused as error:
            self._recovered()
            await self._refused(claim, sent, error)
            return "refused"
        except CallFailed as error:
            suspicious = error.code in _BREAKDOWNS
            _log.debug("a call to the model failed: %s", error.message)
            await self._failed(claim, sent, error, suspicious=suspicious)
            return "failed"
        except Exception as error:  # noqa: BLE001 - the loop must outlive it, and waiters must hear of it
            _log.exception("a call to the model ended unexpectedly")
            message = f"the proxy could not call the model: {type(error).__name__}"
            await self._failed(claim, sent, CallFailed(grpc.StatusCode.INTERNAL, message, None, told=message))
            return "failed"
        else:
            self._recovered()
            outcomes: dict[bytes, Outcome] = {
                pair.digest: answer for pair, answer in zip(sent, answers, strict=True)
            }
            levels = {key: level for key, level in outcomes.items() if isinstance(level, int)}
            if self._queue.answers_live_elsewhere:
                await self._store.put(levels, asked_at=asked_at)
                await self._queue.fulfil(claim, outcomes)
            else:
                # Whoever waits first: a store that is slow or full delays no answer, and keeps none away.
                await self._queue.fulfil(claim, outcomes)
                await self._store.put(levels, asked_at=asked_at)
            return "answered"
        finally:
            left.set()

    async def _tell_late(self, claim: Claim, *, told_seconds: float = 0.0) -> float | None:
        """By how much the next slot is moved, as the queue was told; None if it cannot be any more."""
        late_seconds = time.monotonic() - claim.slot_at
        if late_seconds <= told_seconds + LATE_SECONDS:
            return told_seconds
        return late_seconds if await self._queue.late(claim, seconds=late_seconds) else None

    async def _unanswered(self, claim: Claim) -> Sequence[Pair]:
        """The claim's pairs that no other replica has answered since they were looked up."""
        look = asyncio.ensure_future(self._store.get([pair.digest for pair in claim.pairs]))
        await asyncio.wait({look}, timeout=_RECHECK_SECONDS)
        if not look.done():  # the slot is now or never; at worst a pair is inferred twice
            look.add_done_callback(self._looks.discard)
            self._looks.add(look)
            return claim.pairs
        levels = look.result()
        found: dict[bytes, Outcome] = {
            pair.digest: level for pair, level in zip(claim.pairs, levels, strict=True) if level
        }
        if found:
            await self._queue.fulfil(claim, found, inferred=False)
        return [pair for pair in claim.pairs if pair.digest not in found]

    async def _refused(self, claim: Claim, sent: Sequence[Pair], refusal: BatchRefused) -> None:
        """End or look for the refused pairs; the model's message may quote any pair of the batch."""

        def told(error: Refused) -> Refused:
            if len(sent) == 1:
                return replace(error, message=refusal.message)
            return replace(error, words=refusal.message, words_for=claim.request)

        named = {sent[position].digest: told(refused) for position, refused in refusal.named.items()}
        await self._queue.refuse(claim, told(Refused(refusal.code, REFUSED_PAIR)), named)

    async def _failed(
        self, claim: Claim, sent: Sequence[Pair], failure: CallFailed, *, suspicious: bool = False
    ) -> None:
        if claim.send_at >= self._failed_at:  # calls that were under way together fail together: once
            self._failures_in_a_row += 1
            self._failed_at = time.monotonic()
            if self._failures_in_a_row == 1:
                _log.warning("a call to the model failed, trying again: %s", failure.told)
        error = Unavailable(failure.told, retry_after_seconds=1.0)
        if len(sent) == 1:
            error.message = failure.message
        else:
            error.words, error.words_for = failure.message, claim.request
        await self._queue.fail(
            claim, error, retry_after_seconds=failure.retry_after_seconds, suspicious=suspicious,
            unsent=failure.unsent,
        )  # fmt: skip

    def _recovered(self) -> None:
        if self._failures_in_a_row:
            _log.info("the model answers again, after %d failed calls", self._failures_in_a_row)
            self._failures_in_a_row = 0
