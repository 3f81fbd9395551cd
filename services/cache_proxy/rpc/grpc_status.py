"""Every error as a gRPC status: code, message, trailers. The table of the contract, and nothing else."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2

from services.cache_proxy.errors import (
    DeadlineExceededError,
    DrainingError,
    InvalidModelResponseError,
    InvalidRequestError,
    ModelUnavailableError,
    PairError,
    PairRejectedError,
    PairsFailedError,
    PermissionDeniedError,
    ProxyError,
    QueueFullError,
    UnauthenticatedError,
)

# Metadata is small: 8 KiB by default. There, a message is percent-encoded, and details are in base 64.
_MAX_METADATA_BYTES = 7_600
_MAX_VIOLATIONS = 50
_VIOLATION_OVERHEAD_BYTES = 32  # tags, lengths, and the longest field
_MAX_MESSAGE_BYTES = 600
_MAX_DESCRIPTION_BYTES = 200

_CODES: Mapping[type[ProxyError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
}
Trailers = tuple[tuple[str, str | bytes], ...]


class GrpcStatus(NamedTuple):
    """What the caller gets."""

    code: grpc.StatusCode
    message: str
    trailers: Trailers


def to_grpc_status(error: ProxyError) -> GrpcStatus:
    """The status of an error."""
    if isinstance(error, InvalidRequestError | UnauthenticatedError | PermissionDeniedError):
        field = error.field if isinstance(error, InvalidRequestError) else None
        return _with_details(_CODES[type(error)], error.message, {field: error.message} if field else {})
    if isinstance(error, QueueFullError):
        return GrpcStatus(
            grpc.StatusCode.RESOURCE_EXHAUSTED, error.message, _pushback(error.retry_after_seconds)
        )
    if isinstance(error, DrainingError):
        message = "this proxy is draining, another one will answer"
        return GrpcStatus(grpc.StatusCode.UNAVAILABLE, message, _pushback(error.retry_after_seconds))
    if isinstance(error, DeadlineExceededError):
        message = (
            f"no answer from the model within {error.waited_seconds:.1f} s; what it answers later is cached"
        )
        return GrpcStatus(grpc.StatusCode.DEADLINE_EXCEEDED, message, ())
    if isinstance(error, PairsFailedError):
        return _pairs_failed_status(error.failures)
    return GrpcStatus(grpc.StatusCode.INTERNAL, "the proxy failed", ())


def _pairs_failed_status(failures: Mapping[int, PairError]) -> GrpcStatus:
    """One status for pairs that may have failed in different ways.

    Refused pairs come first: they are named, and without them the rest may be asked again; then pairs that
    the model answered with nonsense; then those that it could not be asked for.
    """
    refused = {index: error for index, error in failures.items() if isinstance(error, PairRejectedError)}
    if refused:
        first = next(iter(refused.values()))
        same = {index: error for index, error in refused.items() if error.code is first.code}
        violations = {
            f"batch[{index}]{error.field}": error.reason or error.message
            for index, error in sorted(same.items())
        }
        return _with_details(first.code, first.message, violations)
    nonsense = {
        index: error for index, error in failures.items() if isinstance(error, InvalidModelResponseError)
    }
    if nonsense:
        index, first_nonsense = next(iter(sorted(nonsense.items())))
        message = f"batch[{index}]: {first_nonsense.message}"
        violations = {f"batch[{index}]": error.message for index, error in sorted(nonsense.items())}
        return _with_details(grpc.StatusCode.INTERNAL, message, violations)
    down = [error for error in failures.values() if isinstance(error, ModelUnavailableError)]
    retry_after_seconds = max((error.retry_after_seconds for error in down), default=1.0)
    message = down[0].message if down else "the model cannot be asked"
    violations = {f"batch[{index}]": "not answered" for index in sorted(failures)}
    status = _with_details(grpc.StatusCode.UNAVAILABLE, message, violations)
    return status._replace(trailers=status.trailers + _pushback(retry_after_seconds))


def _with_details(code: grpc.StatusCode, message: str, violations: Mapping[str, str]) -> GrpcStatus:
    message = _truncate(message, _MAX_MESSAGE_BYTES)
    if not violations:
        return GrpcStatus(code, message, ())
    size_bytes = len(message.encode())
    sent_bytes = size_bytes if message.isascii() and message.isprintable() else 3 * size_bytes
    room_bytes = (_MAX_METADATA_BYTES - sent_bytes) * 3 // 4 - size_bytes
    most_bytes = min(
        _MAX_DESCRIPTION_BYTES,
        room_bytes // min(len(violations), _MAX_VIOLATIONS) - _VIOLATION_OVERHEAD_BYTES,
    )
    listed = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=field, description=_truncate(description, most_bytes)
            )
            for field, description in itertools.islice(violations.items(), _MAX_VIOLATIONS)
        ]
    )
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(listed)
    return GrpcStatus(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


def _truncate(text: str, most_bytes: int) -> str:
    return text.encode()[:most_bytes].decode(errors="ignore")


def _pushback(seconds: float) -> Trailers:
    return (("grpc-retry-pushback-ms", str(max(1, round(seconds * 1000)))),)
