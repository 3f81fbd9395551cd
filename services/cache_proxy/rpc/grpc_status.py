"""Convert errors to gRPC statuses: code, message and trailers, as the table in the contract defines them."""

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

# Metadata is limited to 8 KiB by default. In it, the message is percent-encoded and details are base64.
_MAX_METADATA_BYTES = 7_600
_MAX_VIOLATIONS = 50
# Tags, lengths, and the longest field name.
_VIOLATION_OVERHEAD_BYTES = 32
_MAX_MESSAGE_BYTES = 600
_MAX_DESCRIPTION_BYTES = 200

_CODES: Mapping[type[ProxyError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
}
Trailers = tuple[tuple[str, str | bytes], ...]


class GrpcStatus(NamedTuple):
    """The status that the caller receives."""

    code: grpc.StatusCode
    message: str
    trailers: Trailers


def to_grpc_status(error: ProxyError) -> GrpcStatus:
    """Return the status for an error."""
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
    """Return one status for pairs that may have failed for different reasons, keyed by their index.

    Rejected pairs come first: the status names them, and the caller can retry the request without them. Next
    come pairs with an invalid response of the model, then pairs that the model was not available for.
    """
    rejected = {index: error for index, error in failures.items() if isinstance(error, PairRejectedError)}
    if rejected:
        first = next(iter(rejected.values()))
        with_same_code = {index: error for index, error in rejected.items() if error.code is first.code}
        violations = {
            f"batch[{index}]{error.field}": error.reason or error.message
            for index, error in sorted(with_same_code.items())
        }
        return _with_details(first.code, first.message, violations)
    invalid = {
        index: error for index, error in failures.items() if isinstance(error, InvalidModelResponseError)
    }
    if invalid:
        index, first_invalid = next(iter(sorted(invalid.items())))
        message = f"batch[{index}]: {first_invalid.message}"
        violations = {f"batch[{index}]": error.message for index, error in sorted(invalid.items())}
        return _with_details(grpc.StatusCode.INTERNAL, message, violations)
    unavailable = [error for error in failures.values() if isinstance(error, ModelUnavailableError)]
    retry_after_seconds = max((error.retry_after_seconds for error in unavailable), default=1.0)
    message = unavailable[0].message if unavailable else "the model is unavailable"
    violations = {f"batch[{index}]": "not answered" for index in sorted(failures)}
    status = _with_details(grpc.StatusCode.UNAVAILABLE, message, violations)
    return status._replace(trailers=status.trailers + _pushback(retry_after_seconds))


def _with_details(code: grpc.StatusCode, message: str, violations: Mapping[str, str]) -> GrpcStatus:
    """Return a status that lists the violations by field, truncated so that it fits the metadata."""
    message = _truncate(message, _MAX_MESSAGE_BYTES)
    if not violations:
        return GrpcStatus(code, message, ())
    # The message is in the metadata twice: percent-encoded, which may triple it, and within the details.
    # These are base64, which adds a third. What is left is divided among the violations.
    size_bytes = len(message.encode())
    encoded_bytes = size_bytes if message.isascii() and message.isprintable() else 3 * size_bytes
    available_bytes = (_MAX_METADATA_BYTES - encoded_bytes) * 3 // 4 - size_bytes
    listed_count = min(len(violations), _MAX_VIOLATIONS)
    max_bytes = min(_MAX_DESCRIPTION_BYTES, available_bytes // listed_count - _VIOLATION_OVERHEAD_BYTES)
    listed = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(
                field=field, description=_truncate(description, max_bytes)
            )
            for field, description in itertools.islice(violations.items(), _MAX_VIOLATIONS)
        ]
    )
    status = status_pb2.Status(code=code.value[0], message=message)
    status.details.add().Pack(listed)
    return GrpcStatus(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


def _truncate(text: str, max_bytes: int) -> str:
    return text.encode()[:max_bytes].decode(errors="ignore")


def _pushback(seconds: float) -> Trailers:
    return (("grpc-retry-pushback-ms", str(max(1, round(seconds * 1000)))),)
