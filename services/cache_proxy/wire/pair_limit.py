"""Count the pairs of a serialized request without parsing it into messages."""

# The first byte of a pair's tag: minimal encoding, and the start of any longer encoding of the same number.
_PAIR_TAG_PREFIXES = (b"\x0a", b"\x8a")
_MIN_PAIR_BYTES = 2
_VARINT, _FIXED64, _LENGTH_DELIMITED, _GROUP, _END_GROUP, _FIXED32 = range(6)
_FIXED_SIZE_BYTES = {_FIXED64: 8, _FIXED32: 4, _GROUP: 0, _END_GROUP: 0}
_CONTINUATION_BIT = 0x80
# A varint has at most ten bytes, of seven bits each.
_MAX_VARINT_SHIFT = 63


def exceeds_pair_limit(message: bytes, limit: int) -> bool:
    """Return whether a serialized request may hold more than `limit` pairs; False is certain.

    Raise IndexError where the message ends too early or is not protobuf.
    """
    if len(message) <= _MIN_PAIR_BYTES * limit:
        return False
    # Bytes that look like tags are counted in 2 ms where fields take 100 ms (a message of 100,000 pairs).
    if sum(map(message.count, _PAIR_TAG_PREFIXES)) <= limit:
        return False
    return _exceeds_field_limit(message, limit)


def _exceeds_field_limit(message: bytes, limit: int) -> bool:
    """Return whether the message has more than `limit` fields of any kind.

    Fields that are not pairs count too: to skip an unlimited number of them would itself be an attack.
    """
    at = 0
    end = len(message)
    for _ in range(limit + 1):
        if at >= end:
            return False
        tag, at = _read_varint(message, at)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            size, at = _read_varint(message, at)
            at += size
        elif wire_type == _VARINT:
            _, at = _read_varint(message, at)
        elif wire_type in _FIXED_SIZE_BYTES:
            at += _FIXED_SIZE_BYTES[wire_type]
        else:
            raise IndexError
    return True


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """Return the varint at this offset, and the offset after it."""
    value = 0
    shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & ~_CONTINUATION_BIT) << shift
        if not byte & _CONTINUATION_BIT:
            return value, at
        shift += 7
        if shift > _MAX_VARINT_SHIFT:
            raise IndexError
