"""What goes through Redis besides plain arguments: msgpack, in the form that Redis's Lua reads and writes.

Whatever comes back may be anything. What is not what it should be raises `StoreError`; it never becomes an
answer.
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

_MAX_TEXT_CHARACTERS = 1000
_MAX_SECONDS = 86_400.0
_CODES = {code.name: code for code in grpc.StatusCode if code is not grpc.StatusCode.OK}


def pack(value: Any) -> bytes:
    """Strings and bytes alike become Lua strings."""
    packed: bytes = msgpack.packb(value, use_bin_type=False)
    return packed


def unpack(packed: Any) -> Any:
    """Every string comes back as bytes."""
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
    # Left out where there are none, so that a replica of the release before can read it too.
    return (
        [*packed, _truncate(error.batch_message), _truncate(error.batch_request_id)]
        if error.batch_request_id
        else packed
    )


def unpack_error(packed: Any) -> PairError:
    """Return the error that was packed. Raises `StoreError` if it is none."""
    try:
        kind, *fields = packed
        if kind == b"nonsense":
            [message] = fields
            return InvalidModelResponseError(message.decode())
        if kind == b"refused":
            code, message, field, reason, *words = (part.decode() for part in fields)
            return PairRejectedError(_CODES[code], message, field, reason, *_words(words))
        if kind == b"unavailable":
            message, retry_after_seconds, *packed_words = fields
            words = [part.decode() for part in packed_words]
            return ModelUnavailableError(
                message.decode(), _parse_seconds(retry_after_seconds), *_words(words)
            )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        message = "an error in Redis cannot be read"
        raise StoreError(message) from error
    message = "an error in Redis is of no known kind"
    raise StoreError(message)


def _truncate(text: str) -> bytes:
    return text[:_MAX_TEXT_CHARACTERS].encode(errors="replace")


def _words(words: list[str]) -> list[str]:
    if len(words) not in {0, 2}:
        raise ValueError(words)
    return words


def _parse_seconds(value: Any) -> float:
    seconds = float(value)
    if isinstance(value, bytes) or not 0 <= seconds <= _MAX_SECONDS:
        raise ValueError(value)
    return seconds
