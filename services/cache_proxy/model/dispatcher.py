"""Move pairs from the queue to the model and back.

The dispatcher claims batches, sends each to the model when its slot begins, and completes or returns its
pairs. The module is longer than 250 lines because the steps of one claim are best read together.
"""

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
    InvalidModelResponseError,
    ModelUnavailableError,
    PairRejectedError,
)
from services.cache_proxy.model.client import ModelClient
from services.cache_proxy.model.responses import PAIR_REJECTED_MESSAGE
from services.cache_proxy.queue.interface import SLOT_TOLERANCE_SECONDS, Claim, Queue
from services.common.tasks import cancel_and_wait
from services.common.tracing import NOOP_SPAN, OFF, Span, Tracing

_log = logging.getLogger(__name__)

# These codes mean an exception inside the model, not an outage: one of the pairs may have caused it.
_MODEL_FAULT_CODES = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS})
_MAX_CALLS_IN_FLIGHT = 128
_RECHECK_TIMEOUT_SECONDS = 0.010


class Dispatcher:
    """Runs one loop that claims batches, and one task for each in-flight call.

    State (event loop only):

    - `_calls`: the tasks of claimed batches.
    - `_call_slots`: how many more may run.
    - `_lookups`: lookups of the store that took too long and go on in the background.
    - `_consecutive_failures` and `_last_failure_at`: how many calls failed in a row, and when the last
      failure was noticed.
    """

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
        self._last_failure_at = -math.inf

    async def run(self) -> None:
        """Claim and send batches until cancelled. In-flight calls go on until `drain`."""
        while True:
            await self._call_slots.acquire()
            decision = await self._queue.claim()
            if isinstance(decision, Claim):
                sent_event = asyncio.Event()
                call = asyncio.create_task(self._run_claim(decision, sent_event))
                self._calls.add(call)
                call.add_done_callback(self._on_call_done)
                # Prepare one batch at a time. Batches that were claimed while another is prepared would miss
                # their slots, be released, and be claimed again.
                await sent_event.wait()
                continue

            # No batch yet: wait for the time that the queue gave, or for a change of the queue.
            self._call_slots.release()
            wait = None if math.isinf(decision.wait_seconds) else decision.wait_seconds
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._queue.wait_for_change(), wait)

    async def drain(self, *, timeout_seconds: float) -> None:
        """Wait for the in-flight calls, so that no answer of the model is lost. Then cancel what is left."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=timeout_seconds)
        await cancel_and_wait(self._calls)

    def _on_call_done(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._call_slots.release()

    async def _run_claim(self, claim: Claim, sent_event: asyncio.Event) -> None:
        """Process a claim to its end.

        `sent_event` is set as soon as the batch has been sent, or it is clear that it will not be.
        """
        outcome = ""
        try:
            with self._trace_batch(claim) as span:
                outcome = await self._send_claim(claim, sent_event)
                span.set_attributes(outcome=outcome)
        except Exception:  # noqa: BLE001 - the claim has ended by now, or nothing here can end it
            _log.exception("a call to the model ended (%s), and what follows failed", outcome or "unknown")

    @contextlib.contextmanager
    def _trace_batch(self, claim: Claim) -> Iterator[Span]:
        """Trace the block. A failure of the tracing library is logged and does not stop the call."""
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
        """Send a claimed batch and process its result. Return the outcome for the trace."""
        sent: Sequence[Pair] = ()
        requested_at = time.monotonic()
        try:
            # Before the slot begins: drop pairs that were answered meanwhile, and build the request.
            sent = await self._recheck_cache(claim)
            batch = self._model.prepare(sent)
            await asyncio.sleep(claim.send_at - time.monotonic())

            # If it is late already, the queue must move the next slot first. If it cannot, or if no pair is
            # left, the batch goes back and its slot is free again.
            postponed_seconds = await self._postpone_slot(claim) if sent else None
            if postponed_seconds is None:
                await self._queue.release(claim)
                return "put back"

            task = await self._model.send(batch)
            try:
                # Sending may have taken time: move the next slot again if it did.
                await self._postpone_slot(claim, postponed_seconds=postponed_seconds)
                sent_event.set()
                answers = await task
            finally:
                task.cancel()
        except BatchRejectedError as error:
            self._on_model_answered()
            await self._on_batch_rejected(claim, sent, error)
            return "refused"
        except CallFailedError as error:
            _log.debug("a call to the model failed: %s", error.message)
            await self._on_call_failed(claim, sent, error, model_fault=error.code in _MODEL_FAULT_CODES)
            return "failed"
        except Exception as error:  # noqa: BLE001 - the loop must go on, and the waiters need an outcome
            _log.exception("a call to the model ended unexpectedly")
            message = f"the proxy could not call the model: {type(error).__name__}"
            failure = CallFailedError(grpc.StatusCode.INTERNAL, message, None, safe_message=message)
            await self._on_call_failed(claim, sent, failure)
            return "failed"
        else:
            self._on_model_answered()
            await self._complete(claim, sent, answers, requested_at)
            return "answered"
        finally:
            sent_event.set()

    async def _complete(
        self,
        claim: Claim,
        sent: Sequence[Pair],
        answers: Sequence[int | InvalidModelResponseError],
        requested_at: float,
    ) -> None:
        """End the pairs of a batch that the model answered, and store their levels."""
        outcomes: dict[bytes, Outcome] = {
            pair.digest: answer for pair, answer in zip(sent, answers, strict=True)
        }
        levels = {digest: level for digest, level in outcomes.items() if isinstance(level, int)}
        if self._queue.store_before_complete:
            await self._store.put(levels, requested_at=requested_at)
            await self._queue.complete(claim, outcomes)
        else:
            # Waiting requests first: a store that is slow or full must not delay their answers.
            await self._queue.complete(claim, outcomes)
            await self._store.put(levels, requested_at=requested_at)

    async def _postpone_slot(self, claim: Claim, *, postponed_seconds: float = 0.0) -> float | None:
        """Move the queue's next slot by as much as this batch is late.

        Return by how much the slot has been moved, counting the `postponed_seconds` of an earlier call, or
        None if the queue can no longer move it.
        """
        late_seconds = time.monotonic() - claim.slot_at
        if late_seconds <= postponed_seconds + SLOT_TOLERANCE_SECONDS:
            return postponed_seconds
        return late_seconds if await self._queue.postpone_slot(claim, seconds=late_seconds) else None

    async def _recheck_cache(self, claim: Claim) -> Sequence[Pair]:
        """Return the claim's pairs that the store does not know, and complete the others.

        Another replica may have answered a pair since it was looked up.
        """
        lookup = asyncio.ensure_future(self._store.get_levels([pair.digest for pair in claim.pairs]))
        await asyncio.wait({lookup}, timeout=_RECHECK_TIMEOUT_SECONDS)
        if not lookup.done():
            # The slot does not wait for a slow store. At worst a pair is inferred twice.
            lookup.add_done_callback(self._lookups.discard)
            self._lookups.add(lookup)
            return claim.pairs
        levels = lookup.result()
        found: dict[bytes, Outcome] = {
            pair.digest: level for pair, level in zip(claim.pairs, levels, strict=True) if level
        }
        if found:
            await self._queue.complete(claim, found, inferred=False)
        return [pair for pair in claim.pairs if pair.digest not in found]

    async def _on_batch_rejected(
        self, claim: Claim, sent: Sequence[Pair], rejection: BatchRejectedError
    ) -> None:
        """Pass a rejection to the queue, which ends the named pairs or searches for the rejected one.

        The model's message may quote any pair of the batch. A lone pair gets it as its own message; otherwise
        only the request that queued the whole batch may read it.
        """

        def with_message(error: PairRejectedError) -> PairRejectedError:
            if len(sent) == 1:
                return replace(error, message=rejection.message)
            return replace(error, batch_message=rejection.message, batch_request_id=claim.request_id)

        errors_by_digest = {
            sent[position].digest: with_message(error) for position, error in rejection.rejections.items()
        }
        error_for_all = with_message(PairRejectedError(rejection.code, PAIR_REJECTED_MESSAGE))
        await self._queue.reject(claim, error_for_all, errors_by_digest)

    async def _on_call_failed(
        self, claim: Claim, sent: Sequence[Pair], failure: CallFailedError, *, model_fault: bool = False
    ) -> None:
        """Pass a failed call to the queue, which retries its pairs or ends them."""
        # Calls that were sent together fail together and count as one failure.
        if claim.send_at >= self._last_failure_at:
            self._consecutive_failures += 1
            self._last_failure_at = time.monotonic()
            if self._consecutive_failures == 1:
                _log.warning("a call to the model failed, trying again: %s", failure.safe_message)

        # As for a rejection: the full message is for a lone pair, or for the one request of the batch.
        error = ModelUnavailableError(failure.safe_message, retry_after_seconds=1.0)
        if len(sent) == 1:
            error.message = failure.message
        else:
            error.batch_message = failure.message
            error.batch_request_id = claim.request_id
        await self._queue.fail(
            claim,
            error,
            retry_after_seconds=failure.retry_after_seconds,
            model_fault=model_fault,
            unsent=failure.unsent,
        )

    def _on_model_answered(self) -> None:
        if self._consecutive_failures:
            _log.info("the model answers again, after %d failed calls", self._consecutive_failures)
            self._consecutive_failures = 0
