# ruff: noqa: RUF001 - letters that look alike are the point
"""What a caller sees on the wire: order, uuids, spelling, trailers."""

import string
from typing import Any

import grpc
import pytest

from protos import seniority_pb2 as pb
from tests.integration.cache_proxy.conftest import ProxyEnvironment
from tests.support.caller import make_pairs
from tests.support.model_server import scripted_level

INT32 = (-(2**31), 2**31 - 1)


def test_answers_come_in_request_order_with_the_callers_uuids(stage: ProxyEnvironment) -> None:
    """Whatever the uuids are (zero, negative, repeated, the limits), each comes back in its own place."""
    uuids = [0, -1, 7, 7, 0, *INT32, 3]
    pairs = make_pairs("uuids", len(uuids))
    for _ in ("from the model", "from the cache"):
        reply = stage.caller.infer(pairs, uuids=uuids)
        assert reply.uuids == uuids
        assert reply.levels == [scripted_level(*pair) for pair in pairs]


def test_an_empty_batch_is_answered_with_an_empty_batch(stage: ProxyEnvironment) -> None:
    """No pairs, no answers, and trailers that say so."""
    reply = stage.caller.infer([])
    assert (reply.code, reply.levels, reply.hits, reply.misses) == (grpc.StatusCode.OK, [], 0, 0)


def test_a_batch_larger_than_the_models_is_split(stage: ProxyEnvironment) -> None:
    """2,500 pairs cost calls of at most 1000, each pair once, and come back in order."""
    pairs = make_pairs("large", 2500)
    reply = stage.caller.infer(pairs)
    assert reply.levels == [scripted_level(*pair) for pair in pairs]
    assert sorted(stage.model.received_pairs("large")) == sorted(pairs)
    assert all(len(call.pairs) <= 1000 for call in stage.model.calls)


def test_empty_strings_are_asked_like_any_other(stage: ProxyEnvironment) -> None:
    """Neither an empty company nor an empty title nor both are special."""
    pairs = [("", ""), ("", "empty title"), ("empty company", "")]
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]


def test_a_pair_repeated_in_a_batch_is_inferred_once(stage: ProxyEnvironment) -> None:
    """Each place is answered, the model sees the pair once, the trailers count every place."""
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
def test_the_model_sees_unicode_as_it_was_spelled(stage: ProxyEnvironment, text: str) -> None:
    """No normal form ever reaches the model."""
    pair = (f"unicode {text}", text)
    assert stage.caller.infer([pair]).levels == [scripted_level(*pair)]
    assert pair in stage.model.received_pairs("unicode")


def test_other_spellings_share_the_first_ones_answer(stage: ProxyEnvironment) -> None:
    """Case, width and white space are folded: the model sees the first caller's spelling alone."""
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


def test_the_border_between_company_and_title_matters(stage: ProxyEnvironment) -> None:
    """("a|b", "c") and ("a", "b|c") are two pairs, and so are all others that read the same joined."""
    pairs = [("border|b", "c"), ("border", "b|c"), ("border|", "bc"), ("borderb", "c"), ("border", "bc")]
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]
    assert len(set(stage.model.received_pairs("border"))) == len(pairs)


def test_trailers_add_up_to_the_batch(stage: ProxyEnvironment) -> None:
    """A pair that was known is a hit, one that waits for the model a miss."""
    known, new = make_pairs("trailers", 30), make_pairs("trailers new", 12)
    stage.caller.infer(known)
    reply = stage.caller.infer([*new, *known])
    assert (reply.hits, reply.misses) == (30, 12)


def test_bad_utf8_is_refused_and_reaches_nobody(stage: ProxyEnvironment) -> None:
    """A string field that is not UTF-8 fails the RPC; the model hears nothing of it."""
    before = len(stage.model.calls)
    raw = b"\x0a\x06\x12\x02\xc3\x28\x1a\x00"  # batch { company: <bad> title: "" }
    call: Any = stage.caller.channel.unary_unary("/SeniorityModel/InferSeniority")
    with pytest.raises(grpc.RpcError) as failed:
        call(raw, timeout=10)
    assert failed.value.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT}
    assert len(stage.model.calls) == before


def test_unknown_fields_and_repeated_fields_are_read_as_protobuf_reads_them(stage: ProxyEnvironment) -> None:
    """The last of a repeated field counts, and what the proto does not know is passed over."""
    item = b"\x08\x05\x12\x05first\x08\x09\x12\x08protobuf\x1a\x01t\x7a\x02hi"
    call: Any = stage.caller.channel.unary_unary(
        "/SeniorityModel/InferSeniority", response_deserializer=pb.SeniorityResponseBatch.FromString
    )
    answer = call(b"\x0a" + bytes([len(item)]) + item, timeout=10).batch
    assert [(one.uuid, one.seniority) for one in answer] == [(9, scripted_level("protobuf", "t"))]


@pytest.mark.parametrize("priority", ["urgent", "", "Interactive", "bulk "])
def test_an_unknown_priority_is_refused_by_name(stage: ProxyEnvironment, priority: str) -> None:
    """`x-priority` is one of two words; anything else is a mistake worth saying."""
    reply = stage.caller.infer([("priority", "t")], metadata=[("x-priority", priority)])
    if priority == "bulk ":  # outer white space of a header's value is not the value's
        assert reply.code in {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
        return
    assert reply.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-priority" in reply.message
    assert "interactive, bulk" in reply.message


def test_odd_caller_names_cost_nothing(stage: ProxyEnvironment) -> None:
    """An empty, long or repeated `x-caller` changes no answer."""
    for metadata in ([("x-caller", "")], [("x-caller", "c" * 500)], [("x-caller", "a"), ("x-caller", "b")]):
        assert stage.caller.infer([("names", "t")], metadata=metadata).code is grpc.StatusCode.OK
