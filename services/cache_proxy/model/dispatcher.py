"""From the queue to the model and back: claims batches, sends them, ends or returns their pairs."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import grpc

from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import (
    BatchRejectedError,
    CallFailedError,
    ModelUnavailableError,
    PairRejectedError,
)
from services.cache_proxy.model.client import PAIR_REJECTED_MESSAGE, ModelClient
from services.cache_proxy.queue.interface import SLOT_TOLERANCE_SECONDS, Claim, Queue
from services.common.tasks import cancel_and_wait
from services.common.tracing import NOOP_SPAN, OFF, Span, Tracing

_log = logging.getLogger(__name__)

# Not an outage but an exception in the model: a pair may be what it cannot bear.
_MODEL_FAULT_CODES = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS})
_MAX_CALLS_IN_FLIGHT = 128
_RECHECK_TIMEOUT_SECONDS = 0.010


class Dispatcher:
    """One loop that claims, one task for each call in flight."""

    def __init__(
        self,
        *,
        queue: Queue,
        model: ModelClient,
        store: ResilientStore,
        replica: str = "",
        tracing: Tracing = OFF,
    ) -> None:
        self._queue = queue
        self._model = model
        self._store = store
        self._replica = replica
        self._tracing = tracing
        self._calls: set[asyncio.Task[None]] = set()
        self._lookups: set[asyncio.Future[Sequence[int]]] = set()
        self._call_slots = asyncio.Semaphore(_MAX_CALLS_IN_FLIGHT)
        self._consecutive_failures = 0
        self._last_failure_at = -math.inf  # when the last of them was noticed

    async def run(self) -> None:
        """Claim and send until cancelled; calls in flight go on until `finish`."""
        while True:
            await self._call_slots.acquire()
            decision = await self._queue.claim()
            if isinstance(decision, Claim):
                left = asyncio.Event()
                call = asyncio.create_task(self._run_claim(decision, left))
                self._calls.add(call)
                call.add_done_callback(self._on_call_done)
                # One batch is made ready at a time: those claimed meanwhile would be late by all that goes
                # before them, go back, and be claimed again.
                await left.wait()
                continue
            self._call_slots.release()
            wait = None if math.isinf(decision.wait_seconds) else decision.wait_seconds
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._queue.wait_for_change(), wait)

    async def drain(self, *, timeout_seconds: float) -> None:
        """Wait for the calls in flight, so that no answer that the model gave is thrown away."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=timeout_seconds)
        await cancel_and_wait(self._calls)

    def _on_call_done(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._call_slots.release()

    async def _run_claim(self, claim: Claim, sent_event: asyncio.Event) -> None:
        """From a claim to its end; `left` is set as soon as the batch is on its way, or will not go."""
        outcome = ""
        try:
            with self._trace_batch(claim) as span:
                outcome = await self._send_claim(claim, sent_event)
                span.set_attributes(outcome=outcome)
        except Exception:  # noqa: BLE001 - the claim is over by then, or nothing here can end it
            _log.exception("a call to the model ended (%s), and what follows failed", outcome or "unknown")

    @contextlib.contextmanager
    def _trace_batch(self, claim: Claim) -> Iterator[Span]:
        """Trace the block. Tracing that fails is logged, and costs no batch its call."""
        with contextlib.ExitStack() as stack:
            try:
                span = stack.enter_context(
                    self._tracing.batch_span(
                        "model.batch", claim.trace_contexts, pairs=len(claim.pairs), replica=self._replica
                    )
                )
            except Exception:  # noqa: BLE001 - whatever a tracing library raises
                _log.exception("a call to the model cannot be traced")
                span = NOOP_SPAN
            yield span

    async def _send_claim(self, claim: Claim, sent_event: asyncio.Event) -> str:
        """See `_do`; what came of it, in a word."""
        sent: Sequence[Pair] = ()
        asked_at = time.monotonic()
        try:
            sent = await self._recheck_cache(claim)
            batch = self._model.prepare(sent)
            await asyncio.sleep(claim.send_at - time.monotonic())
            told = await self._postpone_slot(claim) if sent else None
            if told is None:
                await self._queue.release(claim)
                return "put back"
            answering = await self._model.send(batch)
            try:
                await self._postpone_slot(
                    claim, postponed_seconds=told
                )  # it has left, perhaps later after all
                sent_event.set()
                answers = await answering
            finally:
                answering.cancel()
        except BatchRejectedError as error:
            self._on_model_answered()
            await self._on_batch_rejected(claim, sent, error)
            return "refused"
        except CallFailedError as error:
            suspicious = error.code in _MODEL_FAULT_CODES
            _log.debug("a call to the model failed: %s", error.message)
            await self._on_call_failed(claim, sent, error, suspicious=suspicious)
            return "failed"
        except Exception as error:  # noqa: BLE001 - the loop must outlive it, and waiters must hear of it
            _log.exception("a call to the model ended unexpectedly")
            message = f"the proxy could not call the model: {type(error).__name__}"
            await self._on_call_failed(
                claim, sent, CallFailedError(grpc.StatusCode.INTERNAL, message, None, safe_message=message)
            )
            return "failed"
        else:
            self._on_model_answered()
            outcomes: dict[bytes, Outcome] = {
                pair.digest: answer for pair, answer in zip(sent, answers, strict=True)
            }
            levels = {key: level for key, level in outcomes.items() if isinstance(level, int)}
            if self._queue.store_before_complete:
                await self._store.put(levels, requested_at=asked_at)
                await self._queue.complete(claim, outcomes)
            else:
                # Whoever waits first: a store that is slow or full delays no answer, and keeps none away.
                await self._queue.complete(claim, outcomes)
                await self._store.put(levels, requested_at=asked_at)
            return "answered"
        finally:
            sent_event.set()

    async def _postpone_slot(self, claim: Claim, *, postponed_seconds: float = 0.0) -> float | None:
        """By how much the next slot is moved, as the queue was told; None if it cannot be any more."""
        late_seconds = time.monotonic() - claim.slot_at
        if late_seconds <= postponed_seconds + SLOT_TOLERANCE_SECONDS:
            return postponed_seconds
        return late_seconds if await self._queue.postpone_slot(claim, seconds=late_seconds) else None

    async def _recheck_cache(self, claim: Claim) -> Sequence[Pair]:
        """The claim's pairs that no other replica has answered since they were looked up."""
        look = asyncio.ensure_future(self._store.get_levels([pair.digest for pair in claim.pairs]))
        await asyncio.wait({look}, timeout=_RECHECK_TIMEOUT_SECONDS)
        if not look.done():  # the slot is now or never; at worst a pair is inferred twice
            look.add_done_callback(self._lookups.discard)
            self._lookups.add(look)
            return claim.pairs
        levels = look.result()
        found: dict[bytes, Outcome] = {
            pair.digest: level for pair, level in zip(claim.pairs, levels, strict=True) if level
        }
        if found:
            await self._queue.complete(claim, found, inferred=False)
        return [pair for pair in claim.pairs if pair.digest not in found]

    async def _on_batch_rejected(
        self, claim: Claim, sent: Sequence[Pair], rejection: BatchRejectedError
    ) -> None:
        """End or look for the refused pairs; the model's message may quote any pair of the batch."""

        def told(error: PairRejectedError) -> PairRejectedError:
            if len(sent) == 1:
                return replace(error, message=rejection.message)
            return replace(error, batch_message=rejection.message, batch_request_id=claim.request_id)

        named = {sent[position].digest: told(refused) for position, refused in rejection.rejections.items()}
        await self._queue.reject(claim, told(PairRejectedError(rejection.code, PAIR_REJECTED_MESSAGE)), named)

    async def _on_call_failed(
        self, claim: Claim, sent: Sequence[Pair], failure: CallFailedError, *, suspicious: bool = False
    ) -> None:
        if claim.send_at >= self._last_failure_at:  # calls that were under way together fail together: once
            self._consecutive_failures += 1
            self._last_failure_at = time.monotonic()
            if self._consecutive_failures == 1:
                _log.warning("a call to the model failed, trying again: %s", failure.safe_message)
        error = ModelUnavailableError(failure.safe_message, retry_after_seconds=1.0)
        if len(sent) == 1:
            error.message = failure.message
        else:
            error.batch_message, error.batch_request_id = failure.message, claim.request_id
        await self._queue.fail(
            claim,
            error,
            retry_after_seconds=failure.retry_after_seconds,
            model_fault=suspicious,
            unsent=failure.unsent,
        )

    def _on_model_answered(self) -> None:
        if self._consecutive_failures:
            _log.info("the model answers again, after %d failed calls", self._consecutive_failures)
            self._consecutive_failures = 0
