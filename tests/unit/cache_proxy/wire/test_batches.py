"""The wire format as bytes: items, uuids and keys."""

import pytest
from google.protobuf import descriptor_pool
from hypothesis import example, given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.errors import InvalidRequestError
from services.cache_proxy.wire import batches

_INT32 = st.integers(-(2**31), 2**31 - 1)
_MAX_FIELD_BYTES = 4096


def _parse(item: bytes) -> batches.ParsedPair:
    return batches.parse([item], [0], max_field_bytes=_MAX_FIELD_BYTES)[0]


@given(_INT32, st.text(max_size=20), st.text(max_size=20))
def test_item_from_protobuf_is_its_uuid_followed_by_its_key(uuid: int, company: str, title: str) -> None:
    """After the uuid comes the canonical key. A response is the uuid's bytes and a level."""
    item = pb.SeniorityRequest(uuid=uuid, company=company, title=title).SerializeToString()
    end = batches.uuid_length(item)
    assert end is not None
    assert _parse(item) == batches.ParsedPair(0, uuid, company, title, item[end:])
    assert batches.response_item(uuid, 5) == item[:end] + batches.level_suffix(5)


@given(_INT32)
def test_only_the_minimal_encoding_of_a_uuid_is_accepted(uuid: int) -> None:
    """What protobuf writes is accepted. The same value in one more byte is not."""
    encoded = pb.SeniorityRequest(uuid=uuid).SerializeToString()
    assert batches.uuid_length(encoded) == len(encoded)
    if uuid > 0:
        longer = encoded[:-1] + bytes([encoded[-1] | 0x80, 0])
        assert pb.SeniorityRequest.FromString(longer).uuid == uuid
        assert batches.uuid_length(longer) is None


@given(st.binary(max_size=14))
# 2^32 - 1, which protobuf reads as -1 in an int32.
@example(b"\xff\xff\xff\xff\x0f")
@example(b"\xff\xff\xff\xff\x0f" + b"\x00" * 9)
@example(b"\xff" * 9 + b"\x01")
@example(b"\xff" * 8 + b"\x7f")
def test_accepted_uuid_means_the_same_in_the_response(after: bytes) -> None:
    """For any bytes with a uuid length, protobuf reads the same uuid from them and from a response."""
    item = b"\x08" + after
    end = batches.uuid_length(item)
    if end is not None:
        uuid = pb.SeniorityRequest.FromString(item[:end]).uuid
        answer = pb.SeniorityResponse.FromString(item[:end] + batches.level_suffix(7))
        assert (answer.uuid, answer.seniority) == (uuid, 7)
        assert end == len(pb.SeniorityRequest(uuid=uuid).SerializeToString()) or item[:end] == b"\x08\x00"


@pytest.mark.parametrize(
    "item",
    [
        b"\x1a\x01t\x12\x01c",
        b"\x12\x01x\x12\x01c\x1a\x01t",
        b"\x12\x01c\x1a\x01t\x08\x05",
        b"\x12\x81\x00c\x1a\x01t",
        b"\x92\x00\x01c\x1a\x01t",
        b"\x12\x01c\x1a\x01t\x7a\x00",
        b"\x12\x01c\x1a\x01t\x20\x01",
        b"\x08\x85\x00\x12\x01c\x1a\x01t",
        b"\x7b\x7c\x12\x01c\x1a\x01t",
    ],
    ids=["order", "repeated", "uuid behind", "length", "tag", "unknown text", "unknown int", "uuid", "group"],
)
def test_nonstandard_encoding_has_the_canonical_key_and_differs_from_it(item: bytes) -> None:
    """Protobuf reads ("c", "t"), which gives the key. The item's bytes after its uuid do not equal it."""
    assert _parse(item).key == b"\x12\x01c\x1a\x01t"
    end = batches.uuid_length(item)
    assert end is None or item[end:] != _parse(item).key


def test_private_message_is_not_in_the_default_pool() -> None:
    """Reflection could publish it from there."""
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("RawBatch")


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_split_reverses_join_for_any_items(items: list[bytes]) -> None:
    """A batch is split into the bytes that it was joined from."""
    assert batches.split(batches.join(items), max_pairs=100) == items


def test_nesting_limit_counts_the_batch_around_an_item() -> None:
    """Groups as deep as protobuf accepts by themselves are one level too deep in a batch, and rejected."""
    deepest = next(
        depth
        for depth in range(200)
        if not _is_parsed_by_protobuf(b"\x0a" + _varint(depth * 2) + _nested_groups(depth))
    )
    assert batches.parse([_nested_groups(deepest - 1)], [0], max_field_bytes=9)[0].company == ""
    with pytest.raises(InvalidRequestError):
        batches.parse([_nested_groups(deepest)], [0], max_field_bytes=9)


def _nested_groups(depth: int) -> bytes:
    return b"\x7b" * depth + b"\x7c" * depth


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])


def _is_parsed_by_protobuf(message: bytes) -> bool:
    try:
        pb.SeniorityRequestBatch.FromString(message)
    # Whether protobuf raises is what is tested.
    except Exception:  # noqa: BLE001
        return False
    return True


@given(
    company=st.text(alphabet="aé😀", max_size=12),
    title=st.text(alphabet="aé😀", max_size=12),
    limit=st.integers(1, 40),
)
def test_field_over_its_limit_in_bytes_is_rejected_by_name(company: str, title: str, limit: int) -> None:
    """Exactly the limit is accepted, one more byte is rejected, and the error names the field."""
    items = [b"", pb.SeniorityRequest(company=company, title=title).SerializeToString()]
    sizes = {"company": len(company.encode()), "title": len(title.encode())}
    over = [name for name, size in sizes.items() if size > limit]
    if not over:
        assert len(batches.parse(items, [0, 1], max_field_bytes=limit)) == 2
        return
    with pytest.raises(InvalidRequestError) as refused:
        batches.parse(items, [0, 1], max_field_bytes=limit)
    assert refused.value.field == f"batch[1].{over[0]}"
    assert str(limit) in refused.value.message


def test_level_suffixes_equal_what_protobuf_writes() -> None:
    """For each of the seven levels."""
    for level in range(1, 8):
        assert batches.LEVEL_SUFFIXES[level] == pb.SeniorityResponse(seniority=level).SerializeToString()
