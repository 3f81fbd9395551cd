# The tests need characters that look alike.
# ruff: noqa: RUF001
"""Responses on the wire: order, uuids, spelling of texts, trailers."""

import string
from typing import Any

import grpc
import pytest

from protos import seniority_pb2 as pb
from tests.integration.cache_proxy.conftest import ProxyEnvironment
from tests.support.caller import make_pairs
from tests.support.model_server import scripted_level

INT32 = (-(2**31), 2**31 - 1)


def test_response_keeps_the_order_and_uuids_of_the_request(stage: ProxyEnvironment) -> None:
    """Also for uuids that are zero, negative, repeated or at the limits of int32."""
    uuids = [0, -1, 7, 7, 0, *INT32, 3]
    pairs = make_pairs("uuids", len(uuids))
    for _ in ("from the model", "from the cache"):
        reply = stage.caller.infer(pairs, uuids=uuids)
        assert reply.uuids == uuids
        assert reply.levels == [scripted_level(*pair) for pair in pairs]


def test_empty_batch_gets_an_empty_response(stage: ProxyEnvironment) -> None:
    """The trailers report 0 hits and 0 misses."""
    reply = stage.caller.infer([])
    assert (reply.code, reply.levels, reply.hits, reply.misses) == (grpc.StatusCode.OK, [], 0, 0)


def test_batch_larger_than_the_models_is_split(stage: ProxyEnvironment) -> None:
    """2,500 pairs are sent in calls of at most 1000, each pair once, and come back in order."""
    pairs = make_pairs("large", 2500)
    reply = stage.caller.infer(pairs)
    assert reply.levels == [scripted_level(*pair) for pair in pairs]
    assert sorted(stage.model.received_pairs("large")) == sorted(pairs)
    assert all(len(call.pairs) <= 1000 for call in stage.model.calls)


def test_empty_texts_are_inferred_like_others(stage: ProxyEnvironment) -> None:
    """An empty company, an empty title, or both."""
    pairs = [("", ""), ("", "empty title"), ("empty company", "")]
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]


def test_pair_repeated_in_a_batch_is_inferred_once(stage: ProxyEnvironment) -> None:
    """Every occurrence gets the level and counts in the trailers, and the model receives the pair once."""
    reply = stage.caller.infer([("twice", "t"), ("twice other", "t"), ("twice", "t"), ("twice", "t")])
    same, other = scripted_level("twice", "t"), scripted_level("twice other", "t")
    assert reply.levels == [same, other, same, same]
    assert len(stage.model.received_pairs("twice")) == 2
    assert (reply.hits, reply.misses) == (0, 4)


@pytest.mark.parametrize(
    "text",
    [
        "Zürich Straße",
        "株式会社",
        "👩‍💻 engineer",
        "ﬁnance",
        "e\u0301",
        "\u202eright",
        "a\x00b",
        "\U0010ffff",
    ],
    ids=string.ascii_lowercase.__getitem__(slice(8)),
)
def test_model_receives_unicode_text_unchanged(stage: ProxyEnvironment, text: str) -> None:
    """Normal forms are used for keys only."""
    pair = (f"unicode {text}", text)
    assert stage.caller.infer([pair]).levels == [scripted_level(*pair)]
    assert pair in stage.model.received_pairs("unicode")


def test_other_spellings_share_the_first_spellings_level(stage: ProxyEnvironment) -> None:
    """Case, width and white space are folded, and the model receives the first spelling only."""
    spelled = [
        ("Spelled ＧmbH", "Senior  Clerk"),
        ("spelled gmbh", "senior clerk"),
        (" SPELLED GMBH\t", "SENIOR CLERK "),
    ]
    first, *others = spelled
    assert stage.caller.infer([first]).levels == [scripted_level(*first)]
    reply = stage.caller.infer(others)
    assert reply.levels == [scripted_level(*first)] * 2
    assert reply.hits == 2
    assert [pair for pair in stage.model.received_pairs() if pair in spelled] == [first]


def test_pairs_with_equal_concatenation_are_distinct(stage: ProxyEnvironment) -> None:
    """("a|b", "c") and ("a", "b|c") are two pairs, like any others whose texts join to the same."""
    pairs = [("border|b", "c"), ("border", "b|c"), ("border|", "bc"), ("borderb", "c"), ("border", "bc")]
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]
    assert len(set(stage.model.received_pairs("border"))) == len(pairs)


def test_trailers_count_hits_and_misses_of_the_batch(stage: ProxyEnvironment) -> None:
    """A cached pair is a hit, one that waits for the model a miss."""
    known, new = make_pairs("trailers", 30), make_pairs("trailers new", 12)
    stage.caller.infer(known)
    reply = stage.caller.infer([*new, *known])
    assert (reply.hits, reply.misses) == (30, 12)


def test_invalid_utf8_fails_the_rpc_and_is_not_sent_to_the_model(stage: ProxyEnvironment) -> None:
    """The RPC fails as a whole if a string field is not UTF-8."""
    before = len(stage.model.calls)
    # batch { company: <bad> title: "" }
    raw = b"\x0a\x06\x12\x02\xc3\x28\x1a\x00"
    call: Any = stage.caller.channel.unary_unary("/SeniorityModel/InferSeniority")
    with pytest.raises(grpc.RpcError) as failed:
        call(raw, timeout=10)
    assert failed.value.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT}
    assert len(stage.model.calls) == before


def test_unknown_and_repeated_fields_are_parsed_as_by_protobuf(stage: ProxyEnvironment) -> None:
    """The last occurrence of a field counts, and unknown fields are skipped."""
    item = b"\x08\x05\x12\x05first\x08\x09\x12\x08protobuf\x1a\x01t\x7a\x02hi"
    call: Any = stage.caller.channel.unary_unary(
        "/SeniorityModel/InferSeniority", response_deserializer=pb.SeniorityResponseBatch.FromString
    )
    answer = call(b"\x0a" + bytes([len(item)]) + item, timeout=10).batch
    assert [(one.uuid, one.seniority) for one in answer] == [(9, scripted_level("protobuf", "t"))]


@pytest.mark.parametrize("priority", ["urgent", "", "Interactive", "bulk "])
def test_unknown_priority_is_rejected_by_name(stage: ProxyEnvironment, priority: str) -> None:
    """The error names `x-priority` and its two values."""
    reply = stage.caller.infer([("priority", "t")], metadata=[("x-priority", priority)])
    # White space around a header's value is not part of the value.
    if priority == "bulk ":
        assert reply.code in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
        return
    assert reply.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-priority" in reply.message
    assert "interactive, bulk" in reply.message


def test_unusable_caller_names_are_accepted(stage: ProxyEnvironment) -> None:
    """An empty, long or repeated `x-caller` does not fail the RPC."""
    for metadata in ([("x-caller", "")], [("x-caller", "c" * 500)], [("x-caller", "a"), ("x-caller", "b")]):
        assert stage.caller.infer([("names", "t")], metadata=metadata).code is grpc.StatusCode.OK
