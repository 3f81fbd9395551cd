"""The wire format as bytes: items, uuids, keys."""

import pytest
from google.protobuf import descriptor_pool
from hypothesis import example, given
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.errors import InvalidRequestError
from services.cache_proxy.wire import batches

_INT32 = st.integers(-(2**31), 2**31 - 1)
_MAX_FIELD_BYTES = 4096


def _read(item: bytes) -> batches.ParsedPair:
    return batches.parse([item], [0], max_field_bytes=_MAX_FIELD_BYTES)[0]


@given(_INT32, st.text(max_size=20), st.text(max_size=20))
def test_an_item_is_its_uuid_and_its_key(uuid: int, company: str, title: str) -> None:
    """As libraries spell it, what follows any uuid is the key; an answer is the uuid's bytes and a level."""
    item = pb.SeniorityRequest(uuid=uuid, company=company, title=title).SerializeToString()
    end = batches.uuid_length(item)
    assert end is not None
    assert _read(item) == batches.ParsedPair(0, uuid, company, title, item[end:])
    assert batches.response_item(uuid, 5) == item[:end] + batches.level_suffix(5)


@given(_INT32)
def test_every_uuid_has_one_spelling(uuid: int) -> None:
    """What protobuf writes is taken; the same value in a byte more is not."""
    spelled = pb.SeniorityRequest(uuid=uuid).SerializeToString()
    assert batches.uuid_length(spelled) == len(spelled)
    if uuid > 0:
        longer = spelled[:-1] + bytes([spelled[-1] | 0x80, 0])
        assert pb.SeniorityRequest.FromString(longer).uuid == uuid
        assert batches.uuid_length(longer) is None


@given(st.binary(max_size=14))
@example(b"\xff\xff\xff\xff\x0f")  # 2^32 - 1, which an int32 reads as -1
@example(b"\xff\xff\xff\xff\x0f" + b"\x00" * 9)
@example(b"\xff" * 9 + b"\x01")
@example(b"\xff" * 8 + b"\x7f")
def test_a_uuid_is_never_taken_for_another(after: bytes) -> None:
    """Whatever stands there: if an end is found, protobuf reads one uuid up to it, the same in an answer."""
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
def test_what_is_spelled_otherwise_has_the_same_key_and_is_none(item: bytes) -> None:
    """Protobuf reads ("c", "t"), so that is its key; its own bytes, less what may be a uuid, are not."""
    assert _read(item).key == b"\x12\x01c\x1a\x01t"
    end = batches.uuid_length(item)
    assert end is None or item[end:] != _read(item).key


def test_the_twin_is_nobodys_business() -> None:
    """Reflection answers from the default pool: the private message is not in it."""
    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName("RawBatch")


@given(st.lists(st.binary(max_size=40), max_size=12))
def test_items_are_split_and_joined_whatever_is_in_them(items: list[bytes]) -> None:
    """A batch comes apart into its items' bytes, and together again."""
    assert batches.split(batches.join(items), max_pairs=100) == items


def test_an_item_is_read_as_deep_as_it_was_sent() -> None:
    """Groups nested as deep as protobuf bears alone are one too deep in a batch: refused, as by protobuf."""
    deepest = next(
        depth for depth in range(200) if not _readable(b"\x0a" + _varint(depth * 2) + _groups(depth))
    )
    assert batches.parse([_groups(deepest - 1)], [0], max_field_bytes=9)[0].company == ""
    with pytest.raises(InvalidRequestError):
        batches.parse([_groups(deepest)], [0], max_field_bytes=9)


def _groups(depth: int) -> bytes:
    return b"\x7b" * depth + b"\x7c" * depth


def _varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128, value >> 7])


def _readable(message: bytes) -> bool:
    try:
        pb.SeniorityRequestBatch.FromString(message)
    except Exception:  # noqa: BLE001 - that is the question
        return False
    return True


@given(
    company=st.text(alphabet="aé😀", max_size=12),
    title=st.text(alphabet="aé😀", max_size=12),
    limit=st.integers(1, 40),
)
def test_each_field_has_its_own_limit_in_bytes(company: str, title: str, limit: int) -> None:
    """Exactly as many bytes are taken, one more is refused, and the field is named."""
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


def test_answer_ends_as_libraries_spell_each_level() -> None:
    """Seven levels, each with what follows the uuid."""
    for level in range(1, 8):
        assert batches.LEVEL_SUFFIXES[level] == pb.SeniorityResponse(seniority=level).SerializeToString()
