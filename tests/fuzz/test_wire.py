"""Requests and responses as bytes: the parsers agree with protobuf, or leave the bytes to it."""

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
    """Return what protobuf reads, None if it cannot parse the message."""
    try:
        batch = pb.SeniorityRequestBatch.FromString(message).batch
    except DecodeError:
        return None
    return [(item.uuid, item.company, item.title) for item in batch]


def check_request(message: bytes) -> None:
    """Check that a request is parsed and answered as by protobuf, or rejected if that cannot parse it."""
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
    """Check that, with all pairs in L1, each answered item has its own uuid and level."""
    l1 = L1Cache(max_bytes=2**20)
    for key in set(keys):
        l1.put(key, _LEVEL, digest=key[:12].ljust(12, b"\0"), epoch=l1.epoch)
    answers, missing = asyncio.run(fast_path.answer_batch(items, l1))
    for place, answer in enumerate(answers):
        if place not in missing:
            read = pb.SeniorityResponse.FromString(answer)
            assert (read.uuid, read.seniority) == (expected[place][0], _LEVEL)


def check_answer(message: bytes) -> None:
    """Check that levels are parsed only where protobuf reads the expected uuids and the same levels."""
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
def test_committed_requests_are_handled_like_protobuf(case: bytes) -> None:
    """For every request of the corpus."""
    check_request(case)


@replay_cases("answers")
def test_committed_responses_are_parsed_like_protobuf_or_not_at_all(case: bytes) -> None:
    """For every response of the corpus."""
    check_answer(case)


@given(mutate_cases("requests"))
def test_mutated_requests_are_handled_like_protobuf(case: bytes) -> None:
    """For some mutations of the corpus."""
    check_request(case)


@given(mutate_cases("answers"))
def test_mutated_responses_are_parsed_like_protobuf_or_not_at_all(case: bytes) -> None:
    """For some mutations of the corpus."""
    check_answer(case)


@pytest.mark.slow
def test_many_mutated_messages_are_handled_like_protobuf() -> None:
    """For hundreds of mutations, different ones in every run."""
    fuzz_for_long("requests", check_request)
    fuzz_for_long("answers", check_answer)
