"""Requests and answers as bytes: read by hand as by messages, or left to messages."""

import asyncio

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given

from protos import seniority_pb2 as pb
from services.augmenter.client.wire import FIRST_UUID, decode_ordered_levels
from services.cache_proxy import fast_path
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.errors import InvalidRequestError
from services.cache_proxy.wire import batches, request_parser
from tests.fuzz.corpus import fuzz_for_long, mutate_cases, replay_cases

_MAX_PAIRS, _MAX_FIELD_BYTES = 200, 4096
_LEVEL = 5


def _by_messages(message: bytes) -> list[tuple[int, str, str]] | None:
    """What protobuf reads; None: nothing."""
    try:
        batch = pb.SeniorityRequestBatch.FromString(message).batch
    except DecodeError:
        return None
    return [(item.uuid, item.company, item.title) for item in batch]


def check_request(message: bytes) -> None:
    """Split, read and answered from memory as messages would be, or refused where they cannot be read."""
    expected = _by_messages(message)
    items = batches.split(message, max_pairs=_MAX_PAIRS)
    if isinstance(items, InvalidRequestError):
        assert expected is None or len(expected) > _MAX_PAIRS
        return
    try:
        read = asyncio.run(request_parser.parse(items, range(len(items)), max_field_bytes=_MAX_FIELD_BYTES))
    except InvalidRequestError:
        read = None
    longest = max((len(text.encode()) for _, *texts in expected or () for text in texts), default=0)
    if expected is None or longest > _MAX_FIELD_BYTES:
        assert read is None
        return
    assert read is not None
    pairs = [read.pair(place, b"") for place in range(len(read))]
    assert [(pair.company, pair.title) for pair in pairs] == [
        (company, title) for _, company, title in expected
    ]
    _check_answers(items, [read.l1_key(place) for place in range(len(read))], expected)


def _check_answers(items: list[bytes], keys: list[bytes], expected: list[tuple[int, str, str]]) -> None:
    """With all of them in memory: what is answered has its own uuid and level."""
    l1 = L1Cache(max_bytes=2**20)
    for key in set(keys):
        l1.put(key, _LEVEL, digest=key[:12].ljust(12, b"\0"), epoch=l1.epoch)
    answers, missing = asyncio.run(fast_path.answer_batch(items, l1))
    for place, answer in enumerate(answers):
        if place not in missing:
            read = pb.SeniorityResponse.FromString(answer)
            assert (read.uuid, read.seniority) == (expected[place][0], _LEVEL)


def check_answer(message: bytes) -> None:
    """Levels are read by hand only where messages read the uuids asked and the same levels."""
    try:
        batch = pb.SeniorityResponseBatch.FromString(message).batch
    except DecodeError:
        batch = None
    for count in {1, 2, 3, 127, 128, 130, len(batch) if batch is not None else 1} - {0}:
        levels = decode_ordered_levels(message, count)
        if levels is not None:
            assert batch is not None
            assert [(one.uuid, one.seniority) for one in batch] == list(enumerate(levels, FIRST_UUID))
            assert len(levels) == count
            assert all(1 <= level <= 7 for level in levels)


@replay_cases("requests")
def test_odd_requests(case: bytes) -> None:
    """Every committed request is read or refused as by messages."""
    check_request(case)


@replay_cases("answers")
def test_odd_answers(case: bytes) -> None:
    """Every committed answer is read as by messages, or left to them."""
    check_answer(case)


@given(mutate_cases("requests"))
def test_damaged_requests(case: bytes) -> None:
    """So is what hypothesis makes of them."""
    check_request(case)


@given(mutate_cases("answers"))
def test_damaged_answers(case: bytes) -> None:
    """So is what hypothesis makes of them."""
    check_answer(case)


@pytest.mark.slow
def test_damaged_messages_for_long() -> None:
    """Hundreds of others in every run."""
    fuzz_for_long("requests", check_request)
    fuzz_for_long("answers", check_answer)
