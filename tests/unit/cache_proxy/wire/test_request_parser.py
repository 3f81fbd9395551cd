"""The request parser: slicing reads every item like protobuf does, whatever its bytes."""

import asyncio
import re
from collections.abc import Sequence

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.errors import InvalidRequestError
from services.cache_proxy.wire import batches
from services.cache_proxy.wire.request_parser import CHUNK_BYTES, CHUNK_PAIRS, PairColumns, parse
from services.common.checkpoint import iter_chunks

_LIMITS = st.sampled_from([2, 40, 126, 127, 128, 4096])
_TEXTS = st.one_of(
    st.text(max_size=4),
    st.sampled_from(["", "a", "é", "x" * 41, "x" * 127, "x" * 128, "\u20ac" * 42, "\u20ac" * 43]),
)
_PLAIN = st.builds(
    lambda uuid, company, title: pb.SeniorityRequest(
        uuid=uuid, company=company, title=title
    ).SerializeToString(),
    st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 127, 128, 16384]),
    _TEXTS,
    _TEXTS,
)
_FRAGMENTS = st.sampled_from(
    [
        b"\x08\x00",
        b"\x08\x05",
        b"\x08\x85\x00",
        b"\x12\x00",
        b"\x12\x01c",
        b"\x12\x02\xc3\xa9",
        b"\x12\x01\xc3",
        b"\x1a\x00",
        b"\x1a\x01t",
        b"\x1a\x03\xed\xa0\x80",
        b"\x12\x81\x00c",
        b"\x92\x00\x01c",
        b"\x20\x01",
        b"\x7b\x7c",
    ]
)
_ITEM = st.one_of(
    _PLAIN,
    st.lists(_FRAGMENTS, max_size=4).map(b"".join),
    st.builds(lambda item, cut: item[: cut % (len(item) + 1)], _PLAIN, st.integers(0, 300)),
    st.builds(
        lambda item, at, byte: item[:at] + bytes([byte]) + item[at + 1 :],
        _PLAIN,
        st.integers(0, 40),
        st.integers(0, 255),
    ),
    st.binary(max_size=12),
)


async def _parse(items: Sequence[bytes], limit: int) -> PairColumns:
    return await parse(items, range(len(items)), max_field_bytes=limit)


@settings(max_examples=500)
@given(st.lists(_ITEM, min_size=1, max_size=2), _LIMITS)
# A character whose bytes are in two texts.
@example([b"\x12\x01c\x1a\x01t", b"\x12\x01\xc3\x1a\x01\xa9"], 40)
@example([b"\x12\x01c\x1a\x00"], 40)
@example([b"\x12\x00\x1a\x01t"], 40)
@example([b"\x12\x02c\x1a\x1a\x01t"], 40)
# A length of two bytes.
@example([b"\x12\x80\x01" + b"x" * 127 + b"\x1a\x1a\x19" + b"t" * 25], 4096)
def test_parser_given_any_bytes_agrees_with_protobuf(items: list[bytes], limit: int) -> None:
    """Any bytes are parsed or rejected as by `batches.parse`: same texts, same canonical key, same uuid."""
    try:
        expected = batches.parse(items, range(len(items)), max_field_bytes=limit)
    except InvalidRequestError as error:
        event("refused")
        with pytest.raises(InvalidRequestError, match=f"^{re.escape(str(error))}$"):
            asyncio.run(_parse(items, limit))
        return
    event(f"read {len(expected)}")
    columns = asyncio.run(_parse(items, limit))
    assert [columns.l1_key(index) for index in range(len(columns))] == [
        pair_by_protobuf.key for pair_by_protobuf in expected
    ]
    pairs = [columns.pair(index, b"") for index in range(len(columns))]
    assert [(pair.company, pair.title) for pair in pairs] == [
        (pair_by_protobuf.company, pair_by_protobuf.title) for pair_by_protobuf in expected
    ]
    for item, offset, pair_by_protobuf in zip(columns.items, columns.key_offsets, expected, strict=True):
        answer = pb.SeniorityResponse.FromString(item[:offset] + batches.LEVEL_SUFFIXES[5])
        assert (answer.uuid, answer.seniority) == (pair_by_protobuf.uuid, 5)


async def test_chunks_of_long_texts_stay_within_both_limits() -> None:
    """Long texts come few at a time, short ones many, and one over the limit by itself."""
    long, usual, over = b"\xc3\xa9" * 4096, bytes(40), bytes(CHUNK_BYTES + 1)
    items = [long] * 6 + [usual] * 1000 + [over] * 2
    chunks = [chunk async for chunk in iter_chunks(items, CHUNK_PAIRS, size=len, max_size=CHUNK_BYTES)]
    assert [item for chunk in chunks for item in chunk] == items
    assert all(len(chunk) == 1 or sum(map(len, chunk)) <= CHUNK_BYTES for chunk in chunks)
    assert all(len(chunk) <= CHUNK_PAIRS for chunk in chunks)
    assert len(chunks) < 16
