"""A request's bytes, looked at before they are made into messages."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MORE = 0x80
_SIZE = {_FIXED64: 8, _FIXED32: 4}


def holds_more_than(message: bytes, limit: int) -> bool:
    """Whether a message has more than `limit` fields at its top level, each of which may be a pair.

    Stops at the first one too many. Raises IndexError where the bytes end too early, or are no message.
    """
    at, end = 0, len(message)
    for _ in range(limit + 1):
        if at >= end:
            return False
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == _LENGTH:
            size, at = _varint(message, at)
            at += size
        elif kind == _VARINT:
            _, at = _varint(message, at)
        elif kind in _SIZE:
            at += _SIZE[kind]
        else:
            raise IndexError
    return True


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & ~_MORE) << shift
        if not byte & _MORE:
            return value, at
        shift += 7
        if shift > 63:  # noqa: PLR2004 - ten bytes
            raise IndexError
