"""Read and write requests and responses as bytes, where protobuf messages would cost more than the answer.

A request is parsed in two ways. One is as a `SeniorityRequestBatch`, whose items are messages. The other is
as a private message with the same field numbers, whose items are uninterpreted bytes.

L1 is looked up by the bytes that follow an item's uuid. L1's keys are *canonical*: they are what
`SeniorityRequest(company, title)` serializes to, they are made only by `parse`, and never copied from a
request. Bytes of a request that equal such a key are therefore canonical too, and mean that pair and no
other.
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

# Matches no uuid, or a uuid as protobuf encodes every int32: in as few bytes as possible, ten if it is
# negative.
_UUID = re.compile(
    rb"""(?: \x08 (?: [\x00-\x7f]
                    | [\x80-\xff]{1,3} [\x01-\x7f]
                    | [\x80-\xff]{4} (?: [\x01-\x07] | [\xf8-\xff] \xff{4} \x01 ) )
         | (?! \x08 ) )""",
    re.VERBOSE,
)


class ParsedPair(NamedTuple):
    """A pair of a request: its position there, its uuid, its texts, and its canonical L1 key."""

    position: int
    uuid: int
    company: str
    title: str
    key: bytes


def _bytes_batch_class() -> Any:
    """Return the class of the private message whose items are bytes.

    It is in a descriptor pool by itself, because reflection publishes what is in the default pool.
    """
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
    """Return the serialized items of a request, or the error that it is to be rejected with.

    The error is returned, because one that is raised here would count as a failure of the proxy itself.
    """
    # Pairs are counted before they are created: 64 MiB can hold 33 million empty pairs, which take a
    # gigabyte. A request that is at most twice over the limit is parsed anyway, so that the error names its
    # exact size.
    parse_limit = 2 * max_pairs
    try:
        if exceeds_pair_limit(message, parse_limit):
            return pair_limit_error(f"over {parse_limit}", max_pairs)
        return list(_BytesBatch.FromString(message).batch)
    except (DecodeError, IndexError):
        return _parse_error()


def join(items: Sequence[bytes]) -> bytes:
    """Return a serialized batch of these serialized items."""
    message: bytes = _BytesBatch(batch=items).SerializeToString()
    return message


def uuid_length(item: bytes) -> int | None:
    """Return how many bytes the uuid takes at the start of an item, None if its encoding is not minimal."""
    match = _UUID.match(item)
    return None if match is None else match.end()


def response_item(uuid: int, level: int) -> bytes:
    """Return the serialized response to one pair."""
    return seniority_pb2.SeniorityResponse(uuid=uuid, seniority=level).SerializeToString()


def level_suffix(level: int) -> bytes:
    """Return the bytes that follow the uuid in the response to a pair. The uuid's bytes are the request's."""
    return bytes((_LEVEL_TAG, level))


LEVEL_SUFFIXES = [level_suffix(level) for level in range(MAX_LEVEL + 1)]


def parse(items: Sequence[bytes], positions: Sequence[int], *, max_field_bytes: int) -> list[ParsedPair]:
    """Parse the items at these positions by protobuf.

    Raise `InvalidRequestError` if one is not a message, has text that is not UTF-8, or a text over the limit.
    """
    try:
        # Items are parsed inside a batch, as they were sent: by itself, an item could nest one level deeper.
        batch = seniority_pb2.SeniorityRequestBatch.FromString(join([items[at] for at in positions])).batch
    except DecodeError:
        raise _parse_error() from None
    pairs = []
    for position, item in zip(positions, batch, strict=True):
        company, title = item.company, item.title
        # A character takes at most four bytes of UTF-8, so shorter texts need no encoding to be measured.
        if len(company) + len(title) > max_field_bytes // 4:
            _check_field_size(f"batch[{position}].company", company, max_field_bytes)
            _check_field_size(f"batch[{position}].title", title, max_field_bytes)
        key = seniority_pb2.SeniorityRequest(company=company, title=title).SerializeToString()
        pairs.append(ParsedPair(position, item.uuid, company, title, key))
    return pairs


def pair_limit_error(pair_count: str, limit: int) -> InvalidRequestError:
    """Return the error for a request with more pairs than the limit."""
    # The field is the batch itself: no single pair is at fault, and a batch without one would still be
    # rejected.
    message = f"batch[{limit}]: the batch holds {pair_count} pairs, the limit is {limit}"
    return InvalidRequestError(message, "batch")


def _parse_error() -> InvalidRequestError:
    return InvalidRequestError("the request is not a SeniorityRequestBatch, or a text in it is not UTF-8")


def _check_field_size(field: str, text: str, limit: int) -> None:
    size = len(text.encode())
    if size > limit:
        message = f"{field}: {size} bytes of text, the limit is {limit}"
        raise InvalidRequestError(message, field)
