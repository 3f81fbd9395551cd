"""Any encoding of a batch is answered or rejected as if it was parsed by protobuf.

Over 250 lines, because the strategies that generate requests belong to the tests that use them.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from protos import seniority_pb2 as pb
from services.cache_proxy.cache.key import fold
from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import open_caller, read_metrics
from tests.support.model_server import Answers, ReceivedCall, scripted_level, scripted_model
from tests.support.processes import ServiceProcess, cache_proxy

_MAX_PAIRS, _MAX_FIELD_BYTES = 6, 40


def _answer_by_normal_form(call: ReceivedCall) -> Answers:
    """Return levels by normal form, so that a level does not depend on which spelling came first."""
    return [
        (uuid, scripted_level(fold(company), fold(title)))
        for uuid, (company, title) in zip(call.ids, call.pairs, strict=True)
    ]


class Outcome(NamedTuple):
    """The expected outcome of a request."""

    code: grpc.StatusCode
    answers: list[tuple[int, int]] | None = None
    field: str = ""


_REJECTED = grpc.StatusCode.INVALID_ARGUMENT


def _outcome_by_protobuf(message: bytes) -> Outcome:
    """Return the outcome of a request as parsed by protobuf."""
    try:
        batch = pb.SeniorityRequestBatch.FromString(message).batch
    except DecodeError:
        return Outcome(_REJECTED)
    if len(batch) > _MAX_PAIRS:
        return Outcome(_REJECTED, field=f"batch[{_MAX_PAIRS}]")
    for index, item in enumerate(batch):
        for name, text in (("company", item.company), ("title", item.title)):
            if len(text.encode()) > _MAX_FIELD_BYTES:
                return Outcome(_REJECTED, field=f"batch[{index}].{name}")
    levels = [(item.uuid, scripted_level(fold(item.company), fold(item.title))) for item in batch]
    return Outcome(grpc.StatusCode.OK, levels)


def _varint(value: int, padding: int = 0) -> bytes:
    """Return a varint encoded in `padding` bytes more than it needs."""
    encoded = bytearray()
    value %= 2**64
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    for _ in range(min(padding, 10 - len(encoded))):
        encoded[-1] |= 128
        encoded.append(0)
    return bytes(encoded)


_PADDING = st.sampled_from([0, 0, 0, 0, 1, 2, 9])
_INT32 = st.sampled_from([0, 1, 127, 128, 300, 16383, 16384, 2**21, 2**28, 2**31 - 1, -1, -300, -(2**31)])
_TEXTS = st.sampled_from([b"", b"acme", b"ACME", b"\x08\x05", b"\xc3\xa9", b"\x12\x04acme", b"x" * 40])
_BAD_TEXTS = st.sampled_from([b"\xc3\x28", b"\xff", b"\xed\xa0\x80", b"x" * 41, b"y" * 130])


def _number(field: st.SearchStrategy[int], value: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda tag, value, tag_padding, padding: _varint(tag << 3, tag_padding % 4) + _varint(value, padding),
        field,
        value,
        _PADDING,
        _PADDING,
    )


def _bytes(field: st.SearchStrategy[int], value: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(
        lambda tag, value, tag_padding, padding: (
            _varint(tag << 3 | 2, tag_padding % 4) + _varint(len(value), padding % 4) + value
        ),
        field,
        value,
        _PADDING,
        _PADDING,
    )


_UUID = _number(st.just(1), _INT32 | st.sampled_from([2**32, 2**32 + 7, 2**63, 2**31]))
_UNKNOWN = st.one_of(
    _number(st.integers(4, 20), _INT32),
    _bytes(st.integers(4, 20), st.binary(max_size=5)),
    # A known field with another wire type.
    _number(st.sampled_from([2, 3]), _INT32),
    # Fields of fixed size.
    st.sampled_from([b"\x21" + b"8" * 8, b"\x25" + b"4" * 4]),
    st.sampled_from(
        [b"\x7b\x7c", b"\x7b\x10\x01\x7c", b"\x0b\x0c", b"\x7b", b"\x7c", b"\x7b\x8c\x01", b"\x06"]
    ),
    st.sampled_from(
        [b"\x7b" * 98 + b"\x7c" * 98, b"\x7b" * 99 + b"\x7c" * 99, b"\x7b" * 100 + b"\x7c" * 100]
    ),
)
_CANONICAL = st.builds(
    lambda uuid, company, title: pb.SeniorityRequest(
        uuid=uuid, company=company.decode(), title=title.decode()
    ).SerializeToString(),
    _INT32,
    _TEXTS,
    _TEXTS,
)
_FIELDS = st.one_of(
    _UUID,
    _bytes(st.just(2), _TEXTS),
    _bytes(st.just(3), _TEXTS),
    _UNKNOWN,
    _bytes(st.integers(2, 3), _BAD_TEXTS),
)
_ITEM = st.one_of(
    _CANONICAL,
    _CANONICAL,
    st.builds(
        lambda item, field, first: field + item if first else item + field, _CANONICAL, _FIELDS, st.booleans()
    ),
    st.lists(_FIELDS, max_size=6).map(b"".join),
    st.builds(lambda item, cut: item[: cut % (len(item) + 1)], _CANONICAL, st.integers(0, 50)),
)
_BATCH = st.builds(
    lambda fields, cut: b"".join(fields)[: None if cut > 8 else -cut or None],
    st.lists(st.one_of(*[_bytes(st.just(1), _ITEM)] * 5, _UNKNOWN), max_size=9),
    st.integers(0, 200),
)


@pytest.fixture(scope="module")
def limited_proxy() -> Iterator[ProxyEnvironment]:
    """Start a proxy with low limits."""
    limits = ("--max-request-pairs", str(_MAX_PAIRS), "--max-field-bytes", str(_MAX_FIELD_BYTES))
    with (
        scripted_model(_answer_by_normal_form) as model,
        cache_proxy(
            "--model-target", model.target, "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS, *limits
        ) as proxy,
        open_caller(proxy.target) as client,
    ):
        yield ProxyEnvironment(client, proxy, model)


def _send(stage: ProxyEnvironment, message: bytes) -> tuple[Outcome, str, dict[str, str]]:
    """Send the bytes; return the outcome, the error message and the trailers."""
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = stage.caller.channel.unary_unary(
        "/SeniorityModel/InferSeniority"
    )
    try:
        response, call_details = call.with_call(message, timeout=60)
    except grpc.RpcError as error:
        failed: Any = error
        return Outcome(failed.code()), str(failed.details()), {}
    batch = pb.SeniorityResponseBatch.FromString(response).batch
    trailers = {str(key): str(value) for key, value in call_details.trailing_metadata() or ()}
    return Outcome(grpc.StatusCode.OK, [(one.uuid, one.seniority) for one in batch]), "", trailers


@settings(max_examples=400)
@given(_BATCH)
@example(b"")
@example(b"\x0a\x00")
@example(b"\x0a\x02\x08\x00")
@example(b"\x0a\x0b\x08" + b"\xff" * 9 + b"\x01")
@example(b"\x0a\x06\x12\x04acme\x0a\x04\x12\x02\xc3\x28")
@example(b"\x0a\x0a\x08\x05\x12\x04acme\x08\x09")
@example(b"\x0a\x00" * 40)
def test_request_in_any_encoding_is_handled_as_if_parsed_by_protobuf(
    limited_proxy: ProxyEnvironment, message: bytes
) -> None:
    """With fields in any order, repeated, unknown, truncated or padded. Sent twice, so that L1 is used."""
    expected = _outcome_by_protobuf(message)
    for is_repeated in (False, True):
        actual, message_text, trailers = _send(limited_proxy, message)
        assert actual == expected._replace(field="")
        assert expected.field in message_text
        if expected.answers is not None:
            hits, misses = int(trailers["x-cache-hits"]), int(trailers["x-cache-misses"])
            assert hits + misses == len(expected.answers)
            assert not (is_repeated and misses)


def test_pairs_of_a_rejected_batch_all_count_as_failed(limited_proxy: ProxyEnvironment) -> None:
    """If one pair is invalid, all count as failed, those that L1 knows too. Each pair counts once."""
    known, bad = b"\x0a\x06\x12\x04acme", b"\x0a\x04\x12\x02\xc3\x28"
    assert _send(limited_proxy, known)[0].code is grpc.StatusCode.OK
    before = _pair_counts(limited_proxy.proxy)
    assert _send(limited_proxy, known * 2 + bad)[0].code is _REJECTED
    assert _send(limited_proxy, known * 4)[0].code is grpc.StatusCode.OK
    after = _pair_counts(limited_proxy.proxy)
    increase = {outcome: after[outcome] - before[outcome] for outcome in after}
    assert {outcome: count for outcome, count in increase.items() if count} == {"failed": 3, "l1": 4}


def _pair_counts(proxy: ServiceProcess) -> dict[str, float]:
    return {
        key[1]: value
        for key, value in read_metrics(proxy.http_url).items()
        if key[0] == "cache_proxy_pairs_total"
    }


def test_l1_turned_off_leaves_l2_to_answer(stage_with: StartProxyEnvironment) -> None:
    """With `--l1-max-bytes 0` there is no entry and no `l1` outcome, and the levels are the same."""
    stage = stage_with("--l1-max-bytes", "0", *UNLIMITED_RATE_FLAGS)
    pairs = [(f"off {number}", "t") for number in range(50)]
    for _ in range(3):
        assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]
    actual = _pair_counts(stage.proxy)
    assert (actual["inferred"], actual["l2"], actual["l1"]) == (50, 100, 0)
    assert read_metrics(stage.proxy.http_url)["cache_proxy_l1_entries",] == 0


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("known", [False, True])
def test_million_empty_pairs_are_answered_in_bounded_memory(
    stage_with: StartProxyEnvironment, known: bool
) -> None:
    """Each pair is answered, the model receives one, and other callers are served meanwhile."""
    stage = stage_with("--max-request-pairs", "1000000", *UNLIMITED_RATE_FLAGS)
    if known:
        stage.caller.infer([("", "")])
    done = threading.Event()
    other_levels: list[float] = []

    def call_repeatedly() -> None:
        with open_caller(stage.proxy.target) as other:
            while not done.is_set():
                other_levels.append(other.infer([("other", "t")]).levels[0])

    others = threading.Thread(target=call_repeatedly)
    others.start()
    actual, _, trailers = _send(stage, b"\x0a\x00" * 1_000_000)
    done.set()
    others.join()
    assert actual.answers == [(0, scripted_level("", ""))] * 1_000_000
    assert trailers["x-cache-hits" if known else "x-cache-misses"] == "1000000"
    assert set(other_levels) == {scripted_level("other", "t")}
    assert (
        stage.model.received_pairs("") == [("", ""), ("other", "t")]
        or len(stage.model.received_pairs("")) == 2
    )
    status = Path(f"/proc/{stage.proxy.process.pid}/status").read_text()
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak_kib < (350 if known else 700) * 1024
