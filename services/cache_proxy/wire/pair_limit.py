"""How many pairs a message holds, before they are made."""

_PAIR_TAG_PREFIXES = (b"\x0a", b"\x8a")  # how the tag of a pair may begin, spelled minimally or not
_MIN_PAIR_BYTES = 2
_VARINT, _FIXED64, _LENGTH_DELIMITED, _GROUP, _END_GROUP, _FIXED32 = range(6)
_FIXED_SIZE_BYTES = {_FIXED64: 8, _FIXED32: 4, _GROUP: 0, _END_GROUP: 0}
_CONTINUATION_BIT = 0x80


def exceeds_pair_limit(message: bytes, limit: int) -> bool:
    """Whether a message may hold more than `limit` pairs: if not, it does not.

    Raises IndexError where it ends too early, or is no message.
    """
    if len(message) <= _MIN_PAIR_BYTES * limit:
        return False
    # Tags, real and apparent, are counted in 2 ms where fields take 100 (a message of 100,000 pairs).
    if sum(map(message.count, _PAIR_TAG_PREFIXES)) <= limit:
        return False
    return _exceeds_field_limit(message, limit)


def _exceeds_field_limit(message: bytes, limit: int) -> bool:
    """Whether there are more fields of any kind: a walk over all others would be an attack of its own."""
    at, end = 0, len(message)
    for _ in range(limit + 1):
        if at >= end:
            return False
        tag, at = _read_varint(message, at)
        kind = tag & 7
        if kind == _LENGTH_DELIMITED:
            size, at = _read_varint(message, at)
            at += size
        elif kind == _VARINT:
            _, at = _read_varint(message, at)
        elif kind in _FIXED_SIZE_BYTES:
            at += _FIXED_SIZE_BYTES[kind]
        else:
            raise IndexError
    return True


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & ~_CONTINUATION_BIT) << shift
        if not byte & _CONTINUATION_BIT:
            return value, at
        shift += 7
        if shift > 63:  # noqa: PLR2004 - ten bytes
            raise IndexError
