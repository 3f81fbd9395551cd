"""The wire format, where making messages of it would cost more than the answer.

The same bytes are read in two ways: as a `SeniorityRequestBatch`, whose items are messages, and as its
private twin, whose items are bytes. What follows the uuid in an item is looked up in L1 as it stands. L1's
keys are *canonical*: what `SeniorityRequest(company, title)` serialises to. They are only ever made in that
way (`read`), never taken from a request; so bytes of a request that equal one are canonical too, and say
that very pair and nothing else.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from protos import seniority_pb2
from services.cache_proxy.errors import InvalidRequestError
from services.cache_proxy.wire.pair_limit import exceeds_pair_limit
from services.common.levels import MAX_LEVEL

BATCH_TAG = 0x0A
UUID_TAG = 0x08
CONTINUATION_BIT = 0x80

_LEVEL_TAG = 0x10

# No uuid, or one as every int32 is spelled: minimal, and in ten bytes if it is negative.
_UUID = re.compile(
    rb"""(?: \x08 (?: [\x00-\x7f]
                    | [\x80-\xff]{1,3} [\x01-\x7f]
                    | [\x80-\xff]{4} (?: [\x01-\x07] | [\xf8-\xff] \xff{4} \x01 ) )
         | (?! \x08 ) )""",
    re.VERBOSE,
)


class ParsedPair(NamedTuple):
    """A pair that L1 does not know: its place in the request, what was asked, and its key."""

    position: int
    uuid: int
    company: str
    title: str
    key: bytes


def _bytes_batch_class() -> Any:
    """The twin. In a pool of its own: what is in the default one, reflection tells the world."""
    file = descriptor_pb2.FileDescriptorProto(name="cache_proxy/wire.proto", syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto
    file.message_type.add(name="RawBatch").field.add(
        name="batch", number=1, type=kind.TYPE_BYTES, label=kind.LABEL_REPEATED
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("RawBatch"))


_BytesBatch = _bytes_batch_class()


def split(message: bytes, *, max_pairs: int) -> list[bytes] | InvalidRequestError:
    """The request's items, or why it has none: raised here, an error would read as the proxy's own failure.

    Pairs are counted before they are made: 64 MiB may hold 33 million empty ones, which take a gigabyte.
    """
    most = 2 * max_pairs  # what is not far above the limit is made, so that its pairs can be counted
    try:
        if exceeds_pair_limit(message, most):
            return pair_limit_error(f"over {most}", max_pairs)
        return list(_BytesBatch.FromString(message).batch)
    except (DecodeError, IndexError):
        return _parse_error()


def join(items: Sequence[bytes]) -> bytes:
    """A batch of these."""
    message: bytes = _BytesBatch(batch=items).SerializeToString()
    return message


def uuid_length(item: bytes) -> int | None:
    """Where an item's uuid ends, if that is spelled as it should be."""
    found = _UUID.match(item)
    return None if found is None else found.end()


def response_item(uuid: int, level: int) -> bytes:
    """The item of an answer."""
    return seniority_pb2.SeniorityResponse(uuid=uuid, seniority=level).SerializeToString()


def level_suffix(level: int) -> bytes:
    """What follows the uuid in it: the uuid's own bytes are those of the request."""
    return bytes((_LEVEL_TAG, level))


LEVEL_SUFFIXES = [level_suffix(level) for level in range(MAX_LEVEL + 1)]


def parse(items: Sequence[bytes], positions: Sequence[int], *, max_field_bytes: int) -> list[ParsedPair]:
    """The items at these positions. Raises `InvalidRequestError`.

    They are read in a batch, as they came: alone, one could be nested a level deeper.
    """
    try:
        batch = seniority_pb2.SeniorityRequestBatch.FromString(join([items[at] for at in positions])).batch
    except DecodeError:
        raise _parse_error() from None
    found = []
    for position, item in zip(positions, batch, strict=True):
        company, title = item.company, item.title
        if len(company) + len(title) > max_field_bytes // 4:  # a character is at most four bytes
            _check_field_size(f"batch[{position}].company", company, max_field_bytes)
            _check_field_size(f"batch[{position}].title", title, max_field_bytes)
        key = seniority_pb2.SeniorityRequest(company=company, title=title).SerializeToString()
        found.append(ParsedPair(position, item.uuid, company, title, key))
    return found


def pair_limit_error(pairs: str, limit: int) -> InvalidRequestError:
    """There are `pairs` of them."""
    # The field is the batch itself: no pair of it is at fault, and without one it would still be refused.
    message = f"batch[{limit}]: the batch holds {pairs} pairs, the limit is {limit}"
    return InvalidRequestError(message, "batch")


def _parse_error() -> InvalidRequestError:
    return InvalidRequestError("the request is not a SeniorityRequestBatch, or a text in it is not UTF-8")


def _check_field_size(field: str, text: str, limit: int) -> None:
    size = len(text.encode())
    if size > limit:
        message = f"{field}: {size} bytes of text, the limit is {limit}"
        raise InvalidRequestError(message, field)
