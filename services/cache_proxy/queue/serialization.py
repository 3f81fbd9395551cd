"""Msgpack values that pass through Redis, in the form that Redis's Lua reads and writes.

Values that come back may have been changed by anyone with access to Redis. A value of another form raises
`StoreError`, and never becomes an answer.
"""

from typing import Any

import grpc
import msgpack

from services.cache_proxy.errors import (
    InvalidModelResponseError,
    ModelUnavailableError,
    PairError,
    PairRejectedError,
    StoreError,
)
from services.cache_proxy.observability.metrics import ProxyMetrics

_MAX_TEXT_CHARACTERS = 1000
_MAX_SECONDS = 86_400.0
_UNREADABLE_RETRY_SECONDS = 1.0
_CODES = {code.name: code for code in grpc.StatusCode if code is not grpc.StatusCode.OK}


def pack(value: Any) -> bytes:
    """Return the value as msgpack. Text and bytes both become Lua strings."""
    packed: bytes = msgpack.packb(value, use_bin_type=False)
    return packed


def unpack(packed: Any) -> Any:
    """Return the value of some msgpack, with every string as bytes. Raises `StoreError`."""
    try:
        return msgpack.unpackb(packed, raw=True, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        message = "the queue's reply cannot be read"
        raise StoreError(message) from error


def pack_error(error: PairError) -> list[Any]:
    """Return the error as a list that Lua can carry: its strings are bytes, as `unpack` returns them."""
    if isinstance(error, InvalidModelResponseError):
        return [b"nonsense", _truncate(error.message)]
    packed: list[Any]
    if isinstance(error, PairRejectedError):
        texts = (error.message, error.field, error.reason)
        packed = [b"refused", error.code.name.encode(), *map(_truncate, texts)]
    elif isinstance(error, ModelUnavailableError):
        packed = [b"unavailable", _truncate(error.message), error.retry_after_seconds]
    else:
        raise TypeError(error)
    # The message that one request alone may read is left out where there is none: a replica of a release
    # before it can then read the error, too.
    if error.batch_request_id:
        packed += [_truncate(error.batch_message), _truncate(error.batch_request_id)]
    return packed


def unpack_error(packed: Any) -> PairError:
    """Return the error that was packed. Raises `StoreError` if it has another form."""
    try:
        kind, *fields = packed
        if kind == b"nonsense":
            [message] = fields
            return InvalidModelResponseError(message.decode())
        if kind == b"refused":
            code, message, field, reason, *batch_fields = (part.decode() for part in fields)
            return PairRejectedError(_CODES[code], message, field, reason, *_check_batch_fields(batch_fields))
        if kind == b"unavailable":
            message, retry_after_seconds, *packed_fields = fields
            batch_fields = [part.decode() for part in packed_fields]
            return ModelUnavailableError(
                message.decode(), _parse_seconds(retry_after_seconds), *_check_batch_fields(batch_fields)
            )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        message = "an error in Redis cannot be read"
        raise StoreError(message) from error
    message = "an error in Redis is of no known kind"
    raise StoreError(message)


def unpack_error_or_unavailable(packed: Any, metrics: ProxyMetrics) -> PairError:
    """Return the error that was packed; an unreadable one is counted and replaced by a retryable one."""
    try:
        return unpack_error(packed)
    except StoreError as error:
        metrics.store_garbage.inc()
        return ModelUnavailableError(f"the pair failed, and {error}", _UNREADABLE_RETRY_SECONDS)


def _truncate(text: str) -> bytes:
    return text[:_MAX_TEXT_CHARACTERS].encode(errors="replace")


def _check_batch_fields(fields: list[str]) -> list[str]:
    """Return the batch's message and the request that may read it. There are both or none of them."""
    if len(fields) not in {0, 2}:
        raise ValueError(fields)
    return fields


def _parse_seconds(value: Any) -> float:
    seconds = float(value)
    if isinstance(value, bytes) or not 0 <= seconds <= _MAX_SECONDS:
        raise ValueError(value)
    return seconds
