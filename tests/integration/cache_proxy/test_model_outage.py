"""A model that goes away and comes back, as callers see it, with the queue of one process and of all."""

import itertools
import threading
import time
from collections.abc import Callable

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import UNPACED, Stage, StageWith
from tests.support.caller import caller, pairs_of
from tests.support.model_server import Abort, Answers, Call, level_of, scripted_model, well
from tests.support.processes import cache_proxy
from tests.support.redis_server import free_port, wait_for

_NAMES = itertools.count()
_OUT = "out to lunch"


def _down(_call: Call) -> Answers:
    raise Abort(StatusCode.UNAVAILABLE, _OUT)


def _broken(_call: Call) -> Answers:
    raise Abort(StatusCode.UNKNOWN, "exception in the model")


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """A queue of one process, and one that replicas share."""
    return "memory:" if request.param == "memory" else str(request.getfixturevalue("shared_redis"))


@pytest.fixture
def staged(url: str, stage_with: StageWith) -> Callable[..., Stage]:
    """A proxy with a deployment of its own."""
    return lambda *flags: stage_with(
        *UNPACED, "--cache-url", url, "--key-prefix", f"outage{next(_NAMES)}", *flags
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [_down, _broken])
def test_three_seconds_without_the_model_cost_no_answer(
    staged: Callable[..., Stage], how: Callable[[Call], Answers]
) -> None:
    """A caller with 25 s is answered, however the calls failed; the model sees few and small ones."""
    stage = staged()
    stage.model.behaviour = how
    asked = stage.caller.start(pairs_of("three seconds", 300), seconds=25)
    time.sleep(3)
    calls = [len(call.pairs) for call in stage.model.calls]
    stage.model.behaviour = well
    assert asked.reply().code is StatusCode.OK
    if how is _down:
        assert len(calls) <= 12
        assert all(pairs <= 10 for pairs in calls[1:])
    assert len(calls) <= 30  # the search for a bad pair sends a half and the others


@pytest.mark.slow
def test_a_model_that_nobody_serves_for_three_seconds_costs_no_answer(url: str) -> None:
    """The same, where its port is closed."""
    address, pairs = f"127.0.0.1:{free_port()}", pairs_of("closed", 20)
    flags = ("--model-target", address, "--cache-url", url, "--key-prefix", f"outage{next(_NAMES)}", *UNPACED)
    with cache_proxy(*flags) as proxy, caller(proxy.target) as asking:
        asked = asking.start(pairs, seconds=25)
        time.sleep(3)
        with scripted_model(address=address):
            assert asked.reply().levels == [level_of(*pair) for pair in pairs]


@pytest.mark.slow
def test_after_the_window_callers_get_the_reason_and_the_time_of_the_next_try(
    staged: Callable[..., Stage],
) -> None:
    """The caller whose pair failed reads the model's words; others are refused at once, and read the code."""
    stage = staged("--model-retry-window", "1s")
    stage.model.behaviour = _down
    first = stage.caller.ask([("first", "t")])
    calls = len(stage.model.calls)
    second = stage.caller.ask([("second", "t")])
    assert {first.code, second.code} == {StatusCode.UNAVAILABLE}
    assert _OUT in first.message
    assert stage.model.target in second.message
    assert "UNAVAILABLE" in second.message
    assert list(second.violations) == ["batch[0]"]
    assert 1000 <= (second.pushback_ms or 0) <= 7000
    assert len(stage.model.calls) == calls


def test_a_caller_whose_deadline_comes_before_the_next_try_is_told_so(staged: Callable[..., Stage]) -> None:
    """UNAVAILABLE with the pushback, long before the deadline, for a pair that waits and for a new one."""
    stage = staged()
    tried = threading.Event()

    def busy(_call: Call) -> Answers:
        tried.set()
        raise Abort(StatusCode.RESOURCE_EXHAUSTED, "busy", (("grpc-retry-pushback-ms", "30000"),))

    stage.model.behaviour = busy
    patient = stage.caller.start([("short", "t")], seconds=60)
    wait_for(tried.is_set, what="the model is called")
    begun_at = time.monotonic()
    for company in ("short", "another"):
        reply = stage.caller.ask([(company, "t")], seconds=20)
        assert reply.code is StatusCode.UNAVAILABLE
        assert 20_000 < (reply.pushback_ms or 0) <= 30_000
    assert time.monotonic() - begun_at < 10
    assert not patient.ended
    patient.cancel()


@pytest.mark.slow
def test_a_new_model_version_that_is_down_costs_the_old_one_nothing(shared_redis: str) -> None:
    """One limit for both, but failures and backoff are each target's."""
    flags = ("--cache-url", shared_redis, "--key-prefix", f"outage{next(_NAMES)}", *UNPACED)
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
        caller(old.target) as asking_old,
        caller(new.target) as asking_new,
    ):
        assert asking_new.ask([("canary", "t")]).code is StatusCode.UNAVAILABLE
        canary = asking_new.start(pairs_of("canary", 50))
        for number in range(30):
            begun_at = time.monotonic()
            assert asking_old.ask([(f"old {number}", "t")]).code is StatusCode.OK
            assert time.monotonic() - begun_at < 2
        canary.reply()
