"""Encodes and decodes the two messages of the contract by hand, and leaves unusual ones to protobuf.

All uuids of a request take two bytes. So in a response that keeps the order of the request, every byte but
the levels is known beforehand: one comparison checks it, and one slice reads the levels.
"""

from collections.abc import Iterable, Sequence

from protos import seniority_pb2 as pb
from services.augmenter.domain import Pair
from services.common.levels import MAX_LEVEL, MIN_LEVEL

FIRST_UUID = 128
_UUIDS = range(FIRST_UUID, FIRST_UUID + 4096)
# A length up to this takes one byte as a varint.
_MAX_ONE_BYTE_LENGTH = 127
# Bytes of one pair's request besides its two texts.
_REQUEST_OVERHEAD_BYTES = 7
# Bytes of one pair's response. The level is the last of them.
_RESPONSE_BYTES = 7


def encode_request(pairs: Sequence[Pair]) -> bytes:
    """Encode a batch of pairs as a request message."""
    if len(pairs) > len(_UUIDS):
        return _encode_by_stub(enumerate(pairs, FIRST_UUID))
    # The request is built as text whose characters are bytes: each pair is one string format, which takes
    # 3,000 instructions, against 4,700 with protobuf.
    return "".join(
        [
            f"\n{_LENGTH_CHARACTERS[_REQUEST_OVERHEAD_BYTES + a + b]}{field}"
            f"{_LENGTH_CHARACTERS[a]}{company}\x1a{_LENGTH_CHARACTERS[b]}{title}"
            if (company := pair.company).isascii()
            and (title := pair.title).isascii()
            and (a := len(company)) + (b := len(title)) <= _MAX_ONE_BYTE_LENGTH - _REQUEST_OVERHEAD_BYTES
            else _encode_by_stub([(uuid, pair)]).decode("latin-1")
            for uuid, field, pair in zip(_UUIDS, _UUID_FIELDS, pairs, strict=False)
        ]
    ).encode("latin-1")


def _encode_by_stub(pairs_by_uuid: Iterable[tuple[int, Pair]]) -> bytes:
    batch = pb.SeniorityRequestBatch()
    for uuid, pair in pairs_by_uuid:
        batch.batch.add(uuid=uuid, company=pair.company, title=pair.title)
    return batch.SerializeToString()


def decode_ordered_levels(response: bytes, count: int) -> bytes | None:
    """Decode a response that has the order of the request.

    Return the levels, a byte each, or None if the response has another order or an invalid level.
    """
    if len(response) != _RESPONSE_BYTES * count or count > len(_UUIDS):
        return None
    levels = response[_RESPONSE_BYTES - 1 :: _RESPONSE_BYTES]
    rest = bytearray(response)
    rest[_RESPONSE_BYTES - 1 :: _RESPONSE_BYTES] = bytes(count)
    if not _RESPONSE_TEMPLATE.startswith(rest) or min(levels) < MIN_LEVEL or max(levels) > MAX_LEVEL:
        return None
    return levels


_UUID_VARINTS = [bytes([uuid & 127 | 128, uuid >> 7]) for uuid in _UUIDS]
_RESPONSE_TEMPLATE = b"".join(
    [b"\n\5\x08%b\x10\0" % varint for varint in _UUID_VARINTS]
    # The response to the largest batch, with all levels 0.
)
_LENGTH_CHARACTERS = [chr(code) for code in range(_MAX_ONE_BYTE_LENGTH + 1)]
_UUID_FIELDS = [
    f"\x08{varint.decode('latin-1')}\x12"
    for varint in _UUID_VARINTS
    # The uuid field, followed by the tag of the company.
]
