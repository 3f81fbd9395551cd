"""A model that is lost and comes back, as callers see it, with a local and a shared queue."""

import itertools
import threading
import time
from collections.abc import Callable

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, open_caller
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    answer_all,
    scripted_level,
    scripted_model,
)
from tests.support.processes import cache_proxy
from tests.support.redis_server import free_port, wait_for

_NAMES = itertools.count()
_ERROR_MESSAGE = "out to lunch"


def _down(_call: ReceivedCall) -> Answers:
    raise AbortCallError(StatusCode.UNAVAILABLE, _ERROR_MESSAGE)


def _broken(_call: ReceivedCall) -> Answers:
    raise AbortCallError(StatusCode.UNKNOWN, "exception in the model")


@pytest.fixture(params=["memory", "redis"])
def cache_url(request: pytest.FixtureRequest) -> str:
    """Return a URL for the queue of one process, and one for a shared queue."""
    return "memory:" if request.param == "memory" else str(request.getfixturevalue("shared_redis"))


@pytest.fixture
def start_proxy(cache_url: str, stage_with: StartProxyEnvironment) -> Callable[..., ProxyEnvironment]:
    """Return a function that starts a proxy with its own deployment."""
    return lambda *flags: stage_with(
        *UNLIMITED_RATE_FLAGS, "--cache-url", cache_url, "--key-prefix", f"outage{next(_NAMES)}", *flags
    )


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", [_down, _broken])
def test_three_seconds_of_failing_calls_fail_no_request(
    start_proxy: Callable[..., ProxyEnvironment], behaviour: Callable[[ReceivedCall], Answers]
) -> None:
    """A caller with 25 s is answered, however the calls failed. The model gets few and small calls."""
    stage = start_proxy()
    stage.model.behaviour = behaviour
    waiting = stage.caller.start_infer(make_pairs("three seconds", 300), timeout_seconds=25)
    time.sleep(3)
    calls = [len(call.pairs) for call in stage.model.calls]
    stage.model.behaviour = answer_all
    assert waiting.result().code is StatusCode.OK
    if behaviour is _down:
        assert len(calls) <= 12
        assert all(pairs <= 10 for pairs in calls[1:])
    # The bisection sends one half and then the other.
    assert len(calls) <= 30


@pytest.mark.slow
def test_three_seconds_of_closed_model_port_fail_no_request(cache_url: str) -> None:
    """The calls are refused by the system."""
    address = f"127.0.0.1:{free_port()}"
    pairs = make_pairs("closed", 20)
    flags = (
        "--model-target",
        address,
        "--cache-url",
        cache_url,
        "--key-prefix",
        f"outage{next(_NAMES)}",
        *UNLIMITED_RATE_FLAGS,
    )
    with cache_proxy(*flags) as proxy, open_caller(proxy.target) as caller:
        waiting = caller.start_infer(pairs, timeout_seconds=25)
        time.sleep(3)
        with scripted_model(address=address):
            assert waiting.result().levels == [scripted_level(*pair) for pair in pairs]


@pytest.mark.slow
def test_callers_get_reason_and_pushback_after_window(
    start_proxy: Callable[..., ProxyEnvironment],
) -> None:
    """The caller whose pair failed gets the model's message.

    Other callers are rejected at once, with the status only.
    """
    stage = start_proxy("--model-retry-window", "1s")
    stage.model.behaviour = _down
    first = stage.caller.infer([("first", "t")])
    calls = len(stage.model.calls)
    second = stage.caller.infer([("second", "t")])
    assert {first.code, second.code} == {StatusCode.UNAVAILABLE}
    assert _ERROR_MESSAGE in first.message
    assert stage.model.target in second.message
    assert "UNAVAILABLE" in second.message
    assert list(second.violations) == ["batch[0]"]
    assert 1000 <= (second.pushback_ms or 0) <= 7000
    assert len(stage.model.calls) == calls


def test_deadline_before_next_retry_gets_unavailable_at_once(
    start_proxy: Callable[..., ProxyEnvironment],
) -> None:
    """With a pushback, and for a waiting pair as for a new one."""
    stage = start_proxy()
    tried = threading.Event()

    def busy(_call: ReceivedCall) -> Answers:
        tried.set()
        raise AbortCallError(StatusCode.RESOURCE_EXHAUSTED, "busy", (("grpc-retry-pushback-ms", "30000"),))

    stage.model.behaviour = busy
    patient = stage.caller.start_infer([("short", "t")], timeout_seconds=60)
    wait_for(tried.is_set, description="the model is called")
    started_at = time.monotonic()
    for company in ("short", "another"):
        reply = stage.caller.infer([(company, "t")], timeout_seconds=20)
        assert reply.code is StatusCode.UNAVAILABLE
        assert 20_000 < (reply.pushback_ms or 0) <= 30_000
    assert time.monotonic() - started_at < 10
    assert not patient.done
    patient.cancel()


@pytest.mark.slow
def test_outage_of_new_model_version_does_not_affect_old_one(shared_redis: str) -> None:
    """Both share the rate limit, but failures and backoff belong to one target."""
    flags = ("--cache-url", shared_redis, "--key-prefix", f"outage{next(_NAMES)}", *UNLIMITED_RATE_FLAGS)
    with (
        scripted_model() as old_model,
        scripted_model(_down) as new_model,
        cache_proxy("--model-target", old_model.target, *flags) as old,
        cache_proxy(
            "--model-target",
            new_model.target,
            "--model-version",
            "2",
            "--model-retry-window",
            "500ms",
            *flags,
        ) as new,
        open_caller(old.target) as old_caller,
        open_caller(new.target) as new_caller,
    ):
        assert new_caller.infer([("canary", "t")]).code is StatusCode.UNAVAILABLE
        canary = new_caller.start_infer(make_pairs("canary", 50))
        for number in range(30):
            started_at = time.monotonic()
            assert old_caller.infer([(f"old {number}", "t")]).code is StatusCode.OK
            assert time.monotonic() - started_at < 2
        canary.result()
