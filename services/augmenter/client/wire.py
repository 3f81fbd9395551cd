"""The contract's two messages as bytes, for texts as nearly all are; whatever else, the stubs do.

A batch is asked with uuids that all take two bytes. In an answer that keeps their order every byte but the
levels is known beforehand, so that it is one comparison, and the levels are one slice.
"""

from collections.abc import Iterable, Sequence

from protos import seniority_pb2 as pb
from services.augmenter.pipeline.jsonl import Pair
from services.common.levels import MAX_LEVEL, MIN_LEVEL

FIRST_UUID = 128
_UUIDS = range(FIRST_UUID, FIRST_UUID + 4096)
_MAX_ONE_BYTE_LENGTH = 127  # the longest that a text can be whose length takes one byte
_REQUEST_OVERHEAD_BYTES = 7  # bytes of a request beside its texts
_RESPONSE_BYTES = 7  # bytes of an answer, the level the last of them


def encode_request(pairs: Sequence[Pair]) -> bytes:
    """The batch."""
    if len(pairs) > len(_UUIDS):
        return _encode_by_stub(enumerate(pairs, FIRST_UUID))
    # As text whose characters are bytes: a pair is one format (3,000 instructions; by the stub 4,700).
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
    made = pb.SeniorityRequestBatch()
    for uuid, pair in pairs_by_uuid:
        made.batch.add(uuid=uuid, company=pair.company, title=pair.title)
    return made.SerializeToString()


def decode_ordered_levels(response: bytes, count: int) -> bytes | None:
    """The levels, if the answer is in the order of the batch and all of them are levels."""
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
)  # the longest, its levels 0
_LENGTH_CHARACTERS = [chr(code) for code in range(_MAX_ONE_BYTE_LENGTH + 1)]
_UUID_FIELDS = [
    f"\x08{varint.decode('latin-1')}\x12" for varint in _UUID_VARINTS
]  # and the tag of what follows
