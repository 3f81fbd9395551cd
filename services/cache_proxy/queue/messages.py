"""What goes through Redis besides plain arguments: msgpack, in the form that Redis's Lua reads and writes.

Whatever comes back may be anything. What is not what it should be raises `StoreError` (a reply) or is passed
over (a published message); it never becomes an answer.
"""

from typing import Any

import grpc
import msgpack

from services.cache_proxy.errors import Nonsense, PairError, Refused, StoreError, Unavailable

_MAX_TEXT = 1000
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
    """An error as a list that Lua can carry."""
    if isinstance(error, Refused):
        return ["refused", error.code.name, error.message[:_MAX_TEXT], error.field, error.reason[:_MAX_TEXT]]
    if isinstance(error, Nonsense):
        return ["nonsense", error.message[:_MAX_TEXT]]
    if isinstance(error, Unavailable):
        return ["unavailable", error.message[:_MAX_TEXT], error.retry_after_seconds]
    raise TypeError(error)


def unpack_error(packed: Any) -> PairError:
    """The error that was packed; of what cannot be read, that the pair could not be asked."""
    try:
        kind, *fields = packed
        if kind == b"refused":
            code, message, field, reason = (part.decode() for part in fields)
            return Refused(_CODES[code], message, field, reason)
        if kind == b"nonsense":
            return Nonsense(fields[0].decode())
        return Unavailable(fields[0].decode(), float(fields[1]))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return Unavailable("another replica failed to ask the model", 1.0)
