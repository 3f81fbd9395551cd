"""Statuses of invalid requests and of pairs that the model rejects or fails, as a caller receives them."""

from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    Trailers,
    answer_all,
    bad_request_details,
    scripted_level,
)

REJECTION_CODES = [StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE, StatusCode.FAILED_PRECONDITION]


class RejectingModel:
    """A model that rejects any batch with a company that contains one of `bad`."""

    def __init__(
        self,
        *bad: str,
        code: StatusCode = StatusCode.INVALID_ARGUMENT,
        named: bool = False,
        model_message: str = "no",
    ) -> None:
        self._bad = bad
        self._code = code
        self._named = named
        self._model_message = model_message

    def __call__(self, call: ReceivedCall) -> Answers:
        """Reject or answer the call."""
        for index, (company, _) in enumerate(call.pairs):
            if any(bad in company for bad in self._bad):
                trailers: Trailers = (
                    bad_request_details((f"batch[{index}].company", "bad word")) if self._named else ()
                )
                raise AbortCallError(self._code, self._model_message, trailers)
        return answer_all(call)


def test_request_over_the_pair_limit_is_rejected_with_index_and_limit(
    stage_with: StartProxyEnvironment,
) -> None:
    """One pair over `--max-request-pairs` rejects the RPC, the limit itself passes.

    The details name the batch and not a pair, because the request would be rejected without that pair too.
    """
    stage = stage_with("--max-request-pairs", "10", *UNLIMITED_RATE_FLAGS)
    assert stage.caller.infer(make_pairs("fits", 10)).code is StatusCode.OK
    reply = stage.caller.infer(make_pairs("many", 11))
    assert reply.code is StatusCode.INVALID_ARGUMENT
    assert reply.message == "batch[10]: the batch holds 11 pairs, the limit is 10"
    assert list(reply.violations) == ["batch"]
    assert not stage.model.received_pairs("many")


@pytest.mark.parametrize("field", ["company", "title"])
def test_field_over_its_limit_is_rejected_by_name(stage: ProxyEnvironment, field: str) -> None:
    """4096 bytes of UTF-8 pass, one more does not. Bytes count, not characters."""
    fits, over = "é" * 2048, "é" * 2048 + "x"
    pairs = [(fits, fits), ("ok", "ok"), (over, "t") if field == "company" else ("c", over)]
    reply = stage.caller.infer(pairs)
    assert reply.code is StatusCode.INVALID_ARGUMENT
    assert f"batch[2].{field}" in reply.message
    assert "4096" in reply.message
    assert list(reply.violations) == [f"batch[2].{field}"]
    assert stage.caller.infer(pairs[:2]).code is StatusCode.OK


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("code", REJECTION_CODES, ids=lambda code: code.name)
def test_rejected_pair_fails_and_other_pairs_are_cached(
    stage: ProxyEnvironment, code: StatusCode, named: bool
) -> None:
    """The caller gets the model's code and message, and every index of the rejected pair.

    The other pairs are answered and cached. Neither they nor the rejected pair cost another call.
    """
    company = f"refused {code.name} {named}"
    stage.model.behaviour = RejectingModel(
        f"{company} bad", code=code, named=named, model_message="the model's message"
    )
    good = make_pairs(f"{company} good", 60)
    bad = (f"{company} bad", "t")
    reply = stage.caller.infer([*good[:17], bad, *good[17:], bad])
    assert reply.code is code
    assert reply.message == "the model's message"
    place = ".company" if named else ""
    assert reply.violations == {
        f"batch[{index}]{place}": "bad word" if named else "the model's message" for index in (17, 61)
    }
    calls = len(stage.model.calls)
    again = stage.caller.infer(good)
    assert (again.levels, again.misses) == ([scripted_level(*pair) for pair in good], 0)
    alone = stage.caller.infer([bad])
    assert (alone.code, list(alone.violations)) == (code, [f"batch[0]{place}"])
    assert len(stage.model.calls) == calls


def test_status_details_list_at_most_fifty_rejected_pairs(stage: ProxyEnvironment) -> None:
    """Metadata is small: of 70 rejected pairs 50 are listed, and all other pairs are cached."""
    stage.model.behaviour = RejectingModel("fifty bad")
    bad, good = make_pairs("fifty bad", 70), make_pairs("fifty good", 30)
    reply = stage.caller.infer([*good, *bad])
    assert reply.code is StatusCode.INVALID_ARGUMENT
    assert list(reply.violations) == [f"batch[{index}]" for index in range(30, 80)]
    assert stage.caller.infer(good).hits == 30


@pytest.mark.parametrize(
    "model_message", ["悪" * 5000, "x" * 20_000, "\n" * 3000, ""], ids=["wide", "long", "lines", "none"]
)
def test_any_message_of_the_model_fits_into_the_metadata(stage: ProxyEnvironment, model_message: str) -> None:
    """A long message is truncated. The status and the indices arrive, for 60 rejected pairs too."""
    company = f"message {len(model_message)}"
    stage.model.behaviour = RejectingModel(company, model_message=model_message[:1500])
    reply = stage.caller.infer(make_pairs(company, 60))
    assert reply.code is StatusCode.INVALID_ARGUMENT, reply.message
    assert "batch[0]" in reply.violations
    assert model_message.startswith(reply.message)


@pytest.mark.parametrize(
    "kind",
    ["missing", "zero", "eight", "negative", "contradicting", "unknown", "empty"],
)
def test_invalid_model_response_is_internal_and_not_cached(stage: ProxyEnvironment, kind: str) -> None:
    """A pair without exactly one level from 1 to 7 fails with INTERNAL and its index, and is not cached."""
    company = f"invalid {kind}"
    bad = (f"{company} bad", "t")

    def respond(call: ReceivedCall) -> Answers:
        answers = []
        for uuid, pair in zip(call.ids, call.pairs, strict=True):
            level = scripted_level(*pair)
            if pair != bad:
                answers.append((uuid, level))
            elif kind in {"zero", "eight", "negative"}:
                answers.append((uuid, {"zero": 0, "eight": 8, "negative": -3}[kind]))
            elif kind == "contradicting":
                answers += [(uuid, level), (uuid, level % 7 + 1)]
            elif kind == "unknown":
                answers.append((uuid + 100_000, level))
        return [] if kind == "empty" else answers

    stage.model.behaviour = respond
    good = make_pairs(f"{company} good", 5)
    reply = stage.caller.infer([*good, bad])
    assert reply.code is StatusCode.INTERNAL
    assert "batch[5]" in reply.violations
    stage.model.behaviour = answer_all
    again = stage.caller.infer([*good, bad])
    assert again.levels == [scripted_level(*pair) for pair in [*good, bad]]
    assert again.misses == (6 if kind == "empty" else 1)


def test_repeated_equal_level_is_accepted(stage: ProxyEnvironment) -> None:
    """A response may contain the same uuid and level twice."""
    stage.model.behaviour = lambda call: [*answer_all(call), *answer_all(call)]
    assert stage.caller.infer([("repeated", "t")]).levels == [scripted_level("repeated", "t")]


def test_message_over_the_byte_limit_is_rejected_without_pushback(stage_with: StartProxyEnvironment) -> None:
    """GRPC itself rejects it with RESOURCE_EXHAUSTED. A retry would not help, so there is no pushback."""
    stage = stage_with("--max-request-bytes", "10KiB", *UNLIMITED_RATE_FLAGS)
    reply = stage.caller.infer(make_pairs("x" * 100, 200))
    assert (reply.code, reply.pushback_ms) == (StatusCode.RESOURCE_EXHAUSTED, None)
    assert stage.caller.infer(make_pairs("fits", 10)).code is StatusCode.OK


def test_millions_of_empty_pairs_are_rejected_without_being_parsed(stage_with: StartProxyEnvironment) -> None:
    """Thirty-two million empty pairs in 64 MiB take no gigabytes, and other callers are served."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    assert stage.caller.infer(make_pairs("known", 1)).code is StatusCode.OK
    with grpc.insecure_channel(stage.proxy.target) as channel:
        raw: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/SeniorityModel/InferSeniority"
        )
        flood = raw.future(b"\x0a\x00" * (2**25 - 16), timeout=60)
        with pytest.raises(grpc.RpcError) as refused:
            flood.result()
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    status = Path(f"/proc/{stage.proxy.process.pid}/status").read_text()
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak_kib < 600 * 1024
    assert stage.caller.infer(make_pairs("known", 1)).code is StatusCode.OK


def test_pair_that_breaks_the_model_fails_and_others_are_answered(stage_with: StartProxyEnvironment) -> None:
    """The model fails every batch with one certain pair. That pair is found, the others are answered."""

    def fail_on_breaker(call: ReceivedCall) -> Answers:
        if any(company == "breaker" for company, _ in call.pairs):
            raise AbortCallError(StatusCode.UNKNOWN, "exception in the model")
        return answer_all(call)

    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    stage.model.behaviour = fail_on_breaker
    pairs = [*make_pairs("innocent", 30), ("breaker", "t")]
    reply = stage.caller.infer(pairs)
    assert reply.code is StatusCode.UNAVAILABLE
    assert reply.pushback_ms
    calls = len(stage.model.calls)
    assert stage.caller.infer(pairs[:-1]).code is StatusCode.OK
    assert len(stage.model.calls) == calls
    assert stage.caller.infer([("breaker", "t")]).code is StatusCode.UNAVAILABLE
    assert len(stage.model.calls) == calls, "remembered for a while"
