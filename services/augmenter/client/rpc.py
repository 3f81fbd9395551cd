"""One RPC to the proxy or the model: sends pairs and returns their levels, or raises a typed error."""

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
from services.augmenter.domain import Pair
from services.augmenter.metrics import Metrics
from services.augmenter.stats import RunStats
from services.common.bearer import Token
from services.common.levels import MAX_LEVEL, MIN_LEVEL
from services.common.reloading_channel import ReloadingChannel
from services.common.tracing import OFF, Tracing

_log = logging.getLogger(__name__)

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
    # Cancelled by the server: our own cancellation is an asyncio.CancelledError.
    grpc.StatusCode.CANCELLED,
}
_PAIR_FIELD = re.compile(r"batch\[(\d{1,9})\](?:\.\w+)?", re.ASCII)
_PUSHBACK_TRAILER = "grpc-retry-pushback-ms"
_METHOD = "/SeniorityModel/InferSeniority"


class CallFailedError(Exception):
    """The call as a whole failed. `pushback_seconds` is the delay that the server demands before a retry."""

    def __init__(
        self, code: str, details: str, *, retryable: bool, pushback_seconds: float | None = None
    ) -> None:
        super().__init__(f"{code}: {details}")
        self.code = code
        self.details = details
        self.retryable = retryable
        self.pushback_seconds = pushback_seconds


class PairsRejectedError(Exception):
    """Pairs of the call are invalid. `reasons` is by index: empty if the server did not name the pairs."""

    def __init__(self, message: str, reasons: dict[int, str]) -> None:
        super().__init__(message)
        self.message = message
        self.reasons = reasons


class SeniorityClient:
    """Calls the service over one channel, and counts the calls in `stats`."""

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
        """Return the levels of the pairs, a byte each. Raises CallFailedError or PairsRejectedError."""
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
                response = await call
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
        return wire.decode_ordered_levels(response, len(pairs)) or _decode_by_uuid(response, len(pairs))


def _log_call(
    code: str, pairs: int, started_at: float, *, hits: int = 0, misses: int = 0, details: str | None = None
) -> None:
    """Log one call at debug. The server's text is logged there only, since it may quote the request."""
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
    """Decode a response in any order. Each pair must have exactly one valid level."""
    try:
        response = seniority_pb2.SeniorityResponseBatch.FromString(response_bytes)
    except DecodeError as error:
        raise CallFailedError("INTERNAL", "the answer cannot be read", retryable=True) from error
    levels = bytearray(count)
    problem = f"{len(response.batch)} answers to {count} pairs" if len(response.batch) != count else ""
    for item in response.batch:
        index = item.uuid - wire.FIRST_UUID
        if not 0 <= index < count:
            problem = f"an answer has uuid {item.uuid}, which was not sent"
        elif levels[index]:
            problem = f"uuid {item.uuid} was answered twice"
        elif not MIN_LEVEL <= item.seniority <= MAX_LEVEL:
            problem = f"an answer has level {item.seniority}"
        else:
            levels[index] = item.seniority
    if problem:
        raise CallFailedError("INTERNAL", f"nonsense in the answer: {problem}", retryable=True)
    return bytes(levels)


def _to_error(error: aio.AioRpcError, count: int) -> CallFailedError | PairsRejectedError:
    code = error.code()
    details = error.details() or ""
    trailers = dict(error.trailing_metadata() or ())
    if code in _REJECTION_CODES:
        return PairsRejectedError(details or code.name, _parse_reasons(trailers, count, details or code.name))
    pushback = _parse_int(trailers.get(_PUSHBACK_TRAILER))
    retryable = code in _RETRYABLE_CODES or (
        code is grpc.StatusCode.RESOURCE_EXHAUSTED and _PUSHBACK_TRAILER in trailers
    )
    # In gRPC, a negative or unreadable pushback means: do not retry.
    if _PUSHBACK_TRAILER in trailers and (pushback is None or pushback < 0):
        return CallFailedError(code.name, details, retryable=False)
    return CallFailedError(
        code.name,
        details,
        retryable=retryable,
        pushback_seconds=None if pushback is None else pushback / 1000,
    )


def _parse_reasons(trailers: dict[str, str | bytes], count: int, message: str) -> dict[int, str]:
    """Return why each pair was rejected, by index. Status details that cannot be parsed name no pair."""
    status = status_pb2.Status()
    bad_request = error_details_pb2.BadRequest()
    try:
        status.ParseFromString(trailers.get("grpc-status-details-bin", b""))
        violations = [
            violation
            for detail in status.details
            if detail.Unpack(bad_request)
            for violation in bad_request.field_violations
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
