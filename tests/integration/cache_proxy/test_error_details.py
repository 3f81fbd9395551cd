"""A model's message about a batch never reveals another caller's pairs."""

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
_Rejection = Callable[[ReceivedCall, str], tuple[str, Trailers]]


def _without_names(_call: ReceivedCall, message: str) -> tuple[str, Trailers]:
    return message, ()


def _details_naming_pairs(call: ReceivedCall, message: str) -> tuple[str, Trailers]:
    named = [(f"batch[{at}].title", f"own {title}") for at, (_, title) in enumerate(call.pairs)]
    return message, bad_request_details(*named)


def _details_repeating_the_message(call: ReceivedCall, message: str) -> tuple[str, Trailers]:
    return message, bad_request_details(
        *((f"batch[{at}].title", f"bad: {message}") for at in range(len(call.pairs)))
    )


def _message_naming_pairs(call: ReceivedCall, message: str) -> tuple[str, Trailers]:
    return f"{', '.join(f'batch[{at}]' for at in range(len(call.pairs)))}: {message}", ()


@pytest.fixture(params=["memory", "redis"])
def batching_proxy(request: pytest.FixtureRequest, stage_with: StartProxyEnvironment) -> ProxyEnvironment:
    """Start a proxy that puts pairs of concurrent callers into one batch."""
    name = f"details{next(_NAMES)}"
    url = "memory:" if request.param == "memory" else request.getfixturevalue("shared_redis")
    return stage_with(*UNLIMITED_RATE_FLAGS, "--cache-url", url, "--key-prefix", name, "--linger", "500ms")


def _infer_for_two_callers(stage: ProxyEnvironment) -> tuple[RpcResult, RpcResult]:
    requests = stage.caller.start_infer([("A", "Nurse")]), stage.caller.start_infer([("B", _SECRET)])
    return requests[0].result(), requests[1].result()


def _text(reply: RpcResult) -> str:
    return f"{reply.message} {reply.violations} {reply.trailers}"


@pytest.mark.parametrize(
    "rejection",
    [_without_names, _details_naming_pairs, _details_repeating_the_message, _message_naming_pairs],
)
def test_rejection_never_quotes_another_callers_pairs(
    batching_proxy: ProxyEnvironment, rejection: _Rejection
) -> None:
    """Each caller gets the code and the reason of its pairs, also for a repeated request.

    This holds however the model names the pairs. A caller with all pairs of the batch gets the model's
    message.
    """

    def reject_batch(call: ReceivedCall) -> Answers:
        message = f"titles not accepted: {[title for _, title in call.pairs]}"
        raise AbortCallError(StatusCode.INVALID_ARGUMENT, *rejection(call, message))

    batching_proxy.model.behaviour = reject_batch
    nurse, secret = _infer_for_two_callers(batching_proxy)
    assert len(batching_proxy.model.calls[0].pairs) == 2, "they shared a batch"
    again = batching_proxy.caller.infer([("A", "Nurse")])
    for reply in (nurse, again):
        assert reply.code is StatusCode.INVALID_ARGUMENT
        assert "Secret" not in _text(reply)
        assert reply.message
    assert secret.code is StatusCode.INVALID_ARGUMENT
    assert "Nurse" not in _text(secret)
    whole_batch = batching_proxy.caller.infer([("C", "Clerk"), ("D", "Driver")])
    assert whole_batch.code is StatusCode.INVALID_ARGUMENT
    # Pairs that the model does not name end in batches of one pair.
    if rejection is not _without_names:
        assert "['Clerk', 'Driver']" in whole_batch.message
        later = batching_proxy.caller.infer([("C", "Clerk")])
        assert "Driver" not in _text(later), "what is remembered is not the whole batch's"


def test_failed_call_never_quotes_another_callers_pairs(stage_with: StartProxyEnvironment) -> None:
    """Each caller gets the code of a failure whose message quotes the batch.

    Only a caller with all pairs of the batch gets the message.
    """
    stage = stage_with(*UNLIMITED_RATE_FLAGS, "--linger", "500ms", "--model-retry-window", "500ms")

    def down(call: ReceivedCall) -> Answers:
        raise AbortCallError(StatusCode.UNAVAILABLE, f"cannot rate {[title for _, title in call.pairs]}")

    stage.model.behaviour = down
    nurse, secret = _infer_for_two_callers(stage)
    assert len(stage.model.calls[0].pairs) == 2, "they shared a batch"
    assert {nurse.code, secret.code} == {StatusCode.UNAVAILABLE}
    assert "UNAVAILABLE" in nurse.message
    assert "Secret" not in _text(nurse)
    assert "Nurse" not in _text(secret)
    stage.model.behaviour = answer_all
