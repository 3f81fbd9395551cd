"""The contract's two messages as bytes, for batches as nearly all are; whatever else, the stubs do.

A batch is asked with uuids from 1. In an answer that keeps their order every byte but the levels is known
beforehand, so that it is one comparison, and the levels are two slices.
"""

from collections.abc import Sequence
from operator import attrgetter

from protos import seniority_pb2 as pb
from services.augmenter.jsonl import Pair
from services.augmenter.levels import MAX_LEVEL, MIN_LEVEL

_ONE_BYTE = 127  # the last uuid that takes one byte; those up to _TWO_BYTES take two
_TWO_BYTES = 16_383
_company, _title = attrgetter("company"), attrgetter("title")
_SHORT, _LONG = 6, 7  # bytes of an answer


def request(pairs: Sequence[Pair]) -> bytes:
    """The batch."""
    try:
        # As text whose characters are bytes: a batch is formatted in one step a pair, and encoded once.
        made = "".join(
            [
                f"\n{_ONE[len(company) + len(title) + around]}{uuid}"
                f"\x12{_ONE[len(company)]}{company}\x1a{_ONE[len(title)]}{title}"
                for (uuid, around), company, title in zip(
                    _UUIDS, map(_company, pairs), map(_title, pairs), strict=False
                )
            ]
        )
        texts = "".join(map(_company, pairs)), "".join(map(_title, pairs))
        if len(pairs) <= len(_UUIDS) and all(map(str.isascii, texts)):
            return made.encode("latin-1")
    except IndexError:  # a text that is longer than nearly all
        pass
    return _request(pairs)


def _request(pairs: Sequence[Pair]) -> bytes:
    made = pb.SeniorityRequestBatch()
    for uuid, pair in enumerate(pairs, 1):
        made.batch.add(uuid=uuid, company=pair.company, title=pair.title)
    return made.SerializeToString()


def levels_in_order(answer: bytes, count: int) -> list[int] | None:
    """The levels, if the answer is in the order of the batch and all of them are levels."""
    short = min(count, _ONE_BYTE)
    head = _SHORT * short
    if len(answer) != head + _LONG * (count - short) or count > _TWO_BYTES:
        return None
    levels = answer[_SHORT - 1 : head : _SHORT] + answer[head + _LONG - 1 :: _LONG]
    rest = bytearray(answer)
    rest[_SHORT - 1 : head : _SHORT] = bytes(short)
    rest[head + _LONG - 1 :: _LONG] = bytes(count - short)
    if not _TEMPLATE.startswith(rest) or min(levels) < MIN_LEVEL or max(levels) > MAX_LEVEL:
        return None
    return list(levels)


def _template() -> bytes:
    """The answer to the longest batch, its levels 0."""
    batch = pb.SeniorityResponseBatch(
        batch=[pb.SeniorityResponse(uuid=uuid, seniority=1) for uuid in range(1, _TWO_BYTES + 1)]
    )
    made = bytearray(batch.SerializeToString())
    head = _SHORT * _ONE_BYTE
    made[_SHORT - 1 : head : _SHORT] = bytes(_ONE_BYTE)
    made[head + _LONG - 1 :: _LONG] = bytes(_TWO_BYTES - _ONE_BYTE)
    return bytes(made)


_TEMPLATE = _template()
_ONE = [chr(length) for length in range(_ONE_BYTE + 1)]
_UUIDS = [  # the field, and the length of all of a request but its texts
    (f"\x08{_ONE[uuid]}", 6)
    if uuid <= _ONE_BYTE
    else (f"\x08{chr(uuid & _ONE_BYTE | 128)}{chr(uuid >> 7)}", 7)
    for uuid in range(1, _TWO_BYTES + 1)
]
