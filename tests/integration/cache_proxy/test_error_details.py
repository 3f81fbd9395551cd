"""What the model says of a batch reaches no caller whose pairs it does not name."""

import itertools
from collections.abc import Callable

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import RpcResult
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    Trailers,
    answer_all,
    bad_request_details,
)

_NAMES = itertools.count()
_SECRET = "Chief of Secret Project X"
_Refusal = Callable[[ReceivedCall, str], tuple[str, Trailers]]


def _unnamed(_call: ReceivedCall, words: str) -> tuple[str, Trailers]:
    return words, ()


def _in_details(call: ReceivedCall, words: str) -> tuple[str, Trailers]:
    named = [(f"batch[{at}].title", f"own {title}") for at, (_, title) in enumerate(call.pairs)]
    return words, bad_request_details(*named)


def _by_details_that_repeat_the_message(call: ReceivedCall, words: str) -> tuple[str, Trailers]:
    return words, bad_request_details(
        *((f"batch[{at}].title", f"bad: {words}") for at in range(len(call.pairs)))
    )


def _by_its_message(call: ReceivedCall, words: str) -> tuple[str, Trailers]:
    return f"{', '.join(f'batch[{at}]' for at in range(len(call.pairs)))}: {words}", ()


@pytest.fixture(params=["memory", "redis"])
def lingering(request: pytest.FixtureRequest, stage_with: StartProxyEnvironment) -> ProxyEnvironment:
    """A proxy whose callers of the same moment share a batch."""
    name = f"words{next(_NAMES)}"
    url = "memory:" if request.param == "memory" else request.getfixturevalue("shared_redis")
    return stage_with(*UNLIMITED_RATE_FLAGS, "--cache-url", url, "--key-prefix", name, "--linger", "500ms")


def _two_tenants(stage: ProxyEnvironment) -> tuple[RpcResult, RpcResult]:
    asked = stage.caller.start_infer([("A", "Nurse")]), stage.caller.start_infer([("B", _SECRET)])
    return asked[0].result(), asked[1].result()


def _text(reply: RpcResult) -> str:
    return f"{reply.message} {reply.violations} {reply.trailers}"


@pytest.mark.parametrize(
    "refusal", [_unnamed, _in_details, _by_details_that_repeat_the_message, _by_its_message]
)
def test_a_refusal_quotes_no_other_callers_pairs(lingering: ProxyEnvironment, refusal: _Refusal) -> None:
    """However the model names the pairs: each caller gets the code and the reason of its own, at once and
    when it asks again; whoever asked for the whole batch gets the model's message.
    """  # noqa: D205 - one thought

    def refuse(call: ReceivedCall) -> Answers:
        words = f"titles not accepted: {[title for _, title in call.pairs]}"
        raise AbortCallError(StatusCode.INVALID_ARGUMENT, *refusal(call, words))

    lingering.model.behaviour = refuse
    nurse, secret = _two_tenants(lingering)
    assert len(lingering.model.calls[0].pairs) == 2, "they shared a batch"
    again = lingering.caller.infer([("A", "Nurse")])
    for reply in (nurse, again):
        assert reply.code is StatusCode.INVALID_ARGUMENT
        assert "Secret" not in _text(reply)
        assert reply.message
    assert secret.code is StatusCode.INVALID_ARGUMENT
    assert "Nurse" not in _text(secret)
    both = lingering.caller.infer([("C", "Clerk"), ("D", "Driver")])
    assert both.code is StatusCode.INVALID_ARGUMENT
    if refusal is not _unnamed:  # unnamed, each ends in a batch of its own
        assert "['Clerk', 'Driver']" in both.message
        later = lingering.caller.infer([("C", "Clerk")])
        assert "Driver" not in _text(later), "what is remembered is not the whole batch's"


def test_a_failed_call_quotes_no_other_callers_pairs(stage_with: StartProxyEnvironment) -> None:
    """A model that breaks down over a batch, and quotes it: the callers learn the code, and who asked for all
    of the batch learns the words.
    """  # noqa: D205 - one thought
    stage = stage_with(*UNLIMITED_RATE_FLAGS, "--linger", "500ms", "--model-retry-window", "500ms")

    def down(call: ReceivedCall) -> Answers:
        raise AbortCallError(StatusCode.UNAVAILABLE, f"cannot rate {[title for _, title in call.pairs]}")

    stage.model.behaviour = down
    nurse, secret = _two_tenants(stage)
    assert len(stage.model.calls[0].pairs) == 2, "they shared a batch"
    assert {nurse.code, secret.code} == {StatusCode.UNAVAILABLE}
    assert "UNAVAILABLE" in nurse.message
    assert "Secret" not in _text(nurse)
    assert "Nurse" not in _text(secret)
    stage.model.behaviour = answer_all
