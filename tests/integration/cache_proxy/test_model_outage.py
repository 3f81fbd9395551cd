"""A model that goes away and comes back, as callers see it, with the queue of one process and of all."""

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
_OUT = "out to lunch"


def _down(_call: ReceivedCall) -> Answers:
    raise AbortCallError(StatusCode.UNAVAILABLE, _OUT)


def _broken(_call: ReceivedCall) -> Answers:
    raise AbortCallError(StatusCode.UNKNOWN, "exception in the model")


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """A queue of one process, and one that replicas share."""
    return "memory:" if request.param == "memory" else str(request.getfixturevalue("shared_redis"))


@pytest.fixture
def staged(url: str, stage_with: StartProxyEnvironment) -> Callable[..., ProxyEnvironment]:
    """A proxy with a deployment of its own."""
    return lambda *flags: stage_with(
        *UNLIMITED_RATE_FLAGS, "--cache-url", url, "--key-prefix", f"outage{next(_NAMES)}", *flags
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [_down, _broken])
def test_three_seconds_without_the_model_cost_no_answer(
    staged: Callable[..., ProxyEnvironment], how: Callable[[ReceivedCall], Answers]
) -> None:
    """A caller with 25 s is answered, however the calls failed; the model sees few and small ones."""
    stage = staged()
    stage.model.behaviour = how
    asked = stage.caller.start_infer(make_pairs("three seconds", 300), timeout_seconds=25)
    time.sleep(3)
    calls = [len(call.pairs) for call in stage.model.calls]
    stage.model.behaviour = answer_all
    assert asked.result().code is StatusCode.OK
    if how is _down:
        assert len(calls) <= 12
        assert all(pairs <= 10 for pairs in calls[1:])
    assert len(calls) <= 30  # the search for a bad pair sends a half and the others


@pytest.mark.slow
def test_a_model_that_nobody_serves_for_three_seconds_costs_no_answer(url: str) -> None:
    """The same, where its port is closed."""
    address, pairs = f"127.0.0.1:{free_port()}", make_pairs("closed", 20)
    flags = (
        "--model-target",
        address,
        "--cache-url",
        url,
        "--key-prefix",
        f"outage{next(_NAMES)}",
        *UNLIMITED_RATE_FLAGS,
    )
    with cache_proxy(*flags) as proxy, open_caller(proxy.target) as asking:
        asked = asking.start_infer(pairs, timeout_seconds=25)
        time.sleep(3)
        with scripted_model(address=address):
            assert asked.result().levels == [scripted_level(*pair) for pair in pairs]


@pytest.mark.slow
def test_after_the_window_callers_get_the_reason_and_the_time_of_the_next_try(
    staged: Callable[..., ProxyEnvironment],
) -> None:
    """The caller whose pair failed reads the model's words; others are refused at once, and read the code."""
    stage = staged("--model-retry-window", "1s")
    stage.model.behaviour = _down
    first = stage.caller.infer([("first", "t")])
    calls = len(stage.model.calls)
    second = stage.caller.infer([("second", "t")])
    assert {first.code, second.code} == {StatusCode.UNAVAILABLE}
    assert _OUT in first.message
    assert stage.model.target in second.message
    assert "UNAVAILABLE" in second.message
    assert list(second.violations) == ["batch[0]"]
    assert 1000 <= (second.pushback_ms or 0) <= 7000
    assert len(stage.model.calls) == calls


def test_a_caller_whose_deadline_comes_before_the_next_try_is_told_so(
    staged: Callable[..., ProxyEnvironment],
) -> None:
    """UNAVAILABLE with the pushback, long before the deadline, for a pair that waits and for a new one."""
    stage = staged()
    tried = threading.Event()

    def busy(_call: ReceivedCall) -> Answers:
        tried.set()
        raise AbortCallError(StatusCode.RESOURCE_EXHAUSTED, "busy", (("grpc-retry-pushback-ms", "30000"),))

    stage.model.behaviour = busy
    patient = stage.caller.start_infer([("short", "t")], timeout_seconds=60)
    wait_for(tried.is_set, description="the model is called")
    begun_at = time.monotonic()
    for company in ("short", "another"):
        reply = stage.caller.infer([(company, "t")], timeout_seconds=20)
        assert reply.code is StatusCode.UNAVAILABLE
        assert 20_000 < (reply.pushback_ms or 0) <= 30_000
    assert time.monotonic() - begun_at < 10
    assert not patient.done
    patient.cancel()


@pytest.mark.slow
def test_a_new_model_version_that_is_down_costs_the_old_one_nothing(shared_redis: str) -> None:
    """One limit for both, but failures and backoff are each target's."""
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
        open_caller(old.target) as asking_old,
        open_caller(new.target) as asking_new,
    ):
        assert asking_new.infer([("canary", "t")]).code is StatusCode.UNAVAILABLE
        canary = asking_new.start_infer(make_pairs("canary", 50))
        for number in range(30):
            begun_at = time.monotonic()
            assert asking_old.infer([(f"old {number}", "t")]).code is StatusCode.OK
            assert time.monotonic() - begun_at < 2
        canary.result()
