"""One RPC to the proxy (or the model): pairs out, levels in the same order, or a typed failure."""

import logging
import re
import time
from collections.abc import Sequence

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from protos import seniority_pb2
from services.augmenter.client import wire
from services.augmenter.metrics import Metrics
from services.augmenter.pipeline.jsonl import Pair
from services.augmenter.stats import RunStats
from services.common.bearer import Token
from services.common.levels import MAX_LEVEL, MIN_LEVEL
from services.common.reloading_channel import ReloadingChannel
from services.common.tracing import OFF, Tracing

_log = logging.getLogger("augmenter")

_REJECTION_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
}
_RETRYABLE_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.CANCELLED,  # by the server: our own cancellation is an asyncio.CancelledError
}
_PAIR_FIELD = re.compile(r"batch\[(\d{1,9})\](?:\.\w+)?", re.ASCII)
_PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
_METHOD = "/SeniorityModel/InferSeniority"


class CallFailedError(Exception):
    """The call as a whole failed. `pushback_seconds` is when the server wants to be asked again."""

    def __init__(
        self, code: str, details: str, *, retryable: bool, pushback_seconds: float | None = None
    ) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details
        self.retryable = retryable
        self.pushback_seconds = pushback_seconds


class PairsRejectedError(Exception):
    """Pairs of the call are invalid: reasons by index; none, if the server did not say which."""

    def __init__(self, message: str, reasons: dict[int, str]) -> None:
        super().__init__(message)
        self.message = message
        self.reasons = reasons


class SeniorityClient:
    """Makes calls on one channel; counts them in `totals`."""

    def __init__(
        self,
        channel: ReloadingChannel,
        *,
        caller: str,
        priority: str,
        deadline_seconds: float,
        stats: RunStats,
        metrics: Metrics,
        token: Token | None = None,
        tracing: Tracing = OFF,
    ) -> None:
        self._channel = channel
        self._metadata = (("x-caller", caller), ("x-priority", priority))
        self._deadline_seconds = deadline_seconds
        self._stats = stats
        self._metrics = metrics
        self._token = token
        self._tracing = tracing

    async def infer(self, pairs: Sequence[Pair], *, count_hits: bool) -> bytes:
        """The pairs' levels, a byte each. Raises CallFailedError or PairsRefusedError."""
        self._stats.rpcs += 1
        with (
            self._metrics.rpc_seconds.time(),
            self._tracing.client_span("InferSeniority", pairs=len(pairs)) as span,
        ):
            request = wire.encode_request(pairs)
            metadata = (*self._metadata, self._token.metadata()) if self._token else self._metadata
            started_at = time.monotonic()
            self._channel.refresh()
            infer: aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.current.unary_unary(_METHOD)
            call = infer(request, timeout=self._deadline_seconds, metadata=metadata + self._tracing.headers())
            try:
                answer = await call
                trailers = dict(await call.trailing_metadata() or ())
            except aio.AioRpcError as error:
                span.set_status(error.code().name)
                _log_call(error.code().name, len(pairs), started_at, details=error.details())
                raise _to_error(error, len(pairs)) from error
            hits, misses = (
                _parse_int(trailers.get(name)) or 0 for name in ("x-cache-hits", "x-cache-misses")
            )
            span.set_attributes(hits=hits, misses=misses)
            span.set_status("OK")
            _log_call("OK", len(pairs), started_at, hits=hits, misses=misses)
        if count_hits:
            self._stats.cache_hits += hits
            self._stats.cache_misses += misses
        return wire.decode_ordered_levels(answer, len(pairs)) or _decode_by_uuid(answer, len(pairs))


def _log_call(
    code: str, pairs: int, started_at: float, *, hits: int = 0, misses: int = 0, details: str | None = None
) -> None:
    """A line an RPC, at debug; there with the server's words, which may quote what was asked."""
    if _log.isEnabledFor(logging.DEBUG):
        seconds = time.monotonic() - started_at
        _log.debug(
            "%s: %d pairs, %d hits, %d misses, %.6f s%s",
            code,
            pairs,
            hits,
            misses,
            seconds,
            f": {details}" if details else "",
            extra={
                "event": "rpc",
                "code": code,
                "pairs": pairs,
                "hits": hits,
                "misses": misses,
                "seconds": round(seconds, 6),
            },
        )


def _decode_by_uuid(response_bytes: bytes, count: int) -> bytes:
    """The levels by uuid: the answers may come in any order, but each exactly once."""
    try:
        response = seniority_pb2.SeniorityResponseBatch.FromString(response_bytes)
    except DecodeError as error:
        raise CallFailedError("INTERNAL", "the answer cannot be read", retryable=True) from error
    levels = bytearray(count)
    wrong = f"{len(response.batch)} answers to {count} pairs" if len(response.batch) != count else ""
    for one in response.batch:
        place = one.uuid - wire.FIRST_UUID
        if not 0 <= place < count:
            wrong = f"an answer has uuid {one.uuid}, which was not asked"
        elif levels[place]:
            wrong = f"uuid {one.uuid} was answered twice"
        elif not MIN_LEVEL <= one.seniority <= MAX_LEVEL:
            wrong = f"an answer has level {one.seniority}"
        else:
            levels[place] = one.seniority
    if wrong:
        raise CallFailedError("INTERNAL", f"nonsense in the answer: {wrong}", retryable=True)
    return bytes(levels)


def _to_error(error: aio.AioRpcError, count: int) -> CallFailedError | PairsRejectedError:
    code, details = error.code(), error.details() or ""
    trailers = dict(error.trailing_metadata() or ())
    if code in _REJECTION_CODES:
        return PairsRejectedError(details or code.name, _parse_reasons(trailers, count, details or code.name))
    pushback = _parse_int(trailers.get(_PUSHBACK_TRAILER))
    retryable = code in _RETRYABLE_CODES or (
        code is grpc.StatusCode.RESOURCE_EXHAUSTED and _PUSHBACK_TRAILER in trailers
    )
    if _PUSHBACK_TRAILER in trailers and (
        pushback is None or pushback < 0
    ):  # gRPC's way to say "do not retry"
        return CallFailedError(code.name, details, retryable=False)
    return CallFailedError(
        code.name,
        details,
        retryable=retryable,
        pushback_seconds=None if pushback is None else pushback / 1000,
    )


def _parse_reasons(trailers: dict[str, str | bytes], count: int, message: str) -> dict[int, str]:
    """Why each pair that the server names was refused; what cannot be read names nothing."""
    status, refusal = status_pb2.Status(), error_details_pb2.BadRequest()
    try:
        status.ParseFromString(trailers.get("grpc-status-details-bin", b""))
        violations = [
            violation
            for detail in status.details
            if detail.Unpack(refusal)
            for violation in refusal.field_violations
        ]
    except (DecodeError, ValueError):
        return {}
    named = ((_PAIR_FIELD.fullmatch(violation.field), violation.description) for violation in violations)
    reasons = {int(found[1]): reason or message for found, reason in named if found}
    return {index: reason for index, reason in reasons.items() if index < count}


def _parse_int(text: str | bytes | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
