"""Statuses of requests that cannot be answered in time: full queue, deadlines, unavailable model."""

import threading
import time

import grpc
import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, read_metrics
from tests.support.model_server import (
    AbortCallError,
    Answers,
    ReceivedCall,
    answer_all,
    scripted_level,
)
from tests.support.processes import ServiceProcess
from tests.support.redis_server import free_port, wait_for


def test_full_queue_rejects_at_once_and_enqueues_nothing(stage_with: StartProxyEnvironment) -> None:
    """Above `--max-queued-pairs`, a request gets RESOURCE_EXHAUSTED with pushback while others still wait.

    Its pairs are never sent to the model.
    """
    stage = stage_with(
        "--max-queued-pairs", "100", "--model-batch-size", "100", *UNLIMITED_RATE_FLAGS, "--linger", "60s"
    )
    waiting = stage.caller.start_infer(make_pairs("waits", 80))
    wait_for(lambda: _queued(stage.proxy) == 80, description="80 pairs wait")
    reply = stage.caller.infer(make_pairs("refused", 21))
    assert not waiting.done
    assert reply.code is StatusCode.RESOURCE_EXHAUSTED
    assert "limit is 100" in reply.message
    assert (reply.pushback_ms or 0) >= 1000
    # With these pairs the batch is full and is sent.
    fits = stage.caller.start_infer(make_pairs("fits", 20))
    assert waiting.result().code is StatusCode.OK
    assert fits.result().code is StatusCode.OK
    assert not stage.model.received_pairs("refused")
    assert stage.caller.infer(make_pairs("freed", 100)).code is StatusCode.OK


def test_queue_full_by_bytes_rejects_and_frees_space_later(stage_with: StartProxyEnvironment) -> None:
    """`--max-queued-bytes` counts the texts. Finished pairs free space."""
    stage = stage_with("--max-queued-bytes", "10000", *UNLIMITED_RATE_FLAGS)
    long = [(f"{number} {'x' * 4000}", "t") for number in range(3)]
    reply = stage.caller.infer(long)
    assert reply.code is StatusCode.RESOURCE_EXHAUSTED
    assert "bytes" in reply.message
    assert (reply.pushback_ms or 0) >= 1000
    assert not stage.model.calls
    for pair in long:
        assert stage.caller.infer([pair]).code is StatusCode.OK


def test_deadline_that_cannot_be_met_is_rejected_at_once(stage_with: StartProxyEnvironment) -> None:
    """40,000 pairs at a batch a second cannot be answered in 30 s, so nothing is enqueued."""
    stage = stage_with("--model-calls-per-second", "1")
    started_at = time.monotonic()
    reply = stage.caller.infer(make_pairs("late", 40_000), timeout_seconds=30)
    # The rejection comes at once, not at the deadline.
    assert time.monotonic() - started_at < 15
    assert reply.code is StatusCode.RESOURCE_EXHAUSTED
    assert reply.pushback_ms is not None
    assert _queued(stage.proxy) == 0
    assert stage.caller.infer([("in time", "t")], timeout_seconds=30).code is StatusCode.OK
    assert not stage.model.received_pairs("late")


@pytest.mark.slow
def test_unavailable_model_gives_unavailable_until_it_recovers(stage_with: StartProxyEnvironment) -> None:
    """After the retry window the caller gets UNAVAILABLE with pushback and indices.

    New pairs are then rejected at once. After the pushback the proxy answers as soon as the model does.
    """
    stage = stage_with("--model-retry-window", "2s", *UNLIMITED_RATE_FLAGS)

    def down(call: ReceivedCall) -> Answers:
        raise AbortCallError(StatusCode.UNAVAILABLE, "out to lunch")

    stage.model.behaviour = down
    reply = stage.caller.infer([("down", "t")])
    assert reply.code is StatusCode.UNAVAILABLE
    assert "out to lunch" in reply.message
    assert (reply.pushback_ms or 0) >= 1000
    assert list(reply.violations) == ["batch[0]"]
    assert 2 <= len(stage.model.received_pairs("down")) <= 8
    calls = len(stage.model.calls)
    at_once = stage.caller.infer([("down", "another")])
    assert (at_once.code, len(stage.model.calls)) == (StatusCode.UNAVAILABLE, calls)
    stage.model.behaviour = answer_all
    time.sleep((at_once.pushback_ms or 0) / 1000)
    assert stage.caller.infer([("down", "t")]).levels == [scripted_level("down", "t")]
    # The log is complete only after the process has ended.
    assert stage.proxy.stop() == 0
    assert stage.proxy.log.count("WARNING") == 1


def test_model_address_without_a_server_gives_unavailable(stage_with: StartProxyEnvironment) -> None:
    """A refused connection is treated like any unavailable model, and the proxy stays ready."""
    target = f"127.0.0.1:{free_port()}"
    stage = stage_with("--model-target", target, "--model-retry-window", "500ms", *UNLIMITED_RATE_FLAGS)
    reply = stage.caller.infer([("unreachable", "t")])
    assert reply.code is StatusCode.UNAVAILABLE
    assert reply.pushback_ms
    assert read_metrics(stage.proxy.http_url)[("cache_proxy_requests_total", "UNAVAILABLE")] == 1


def test_calls_that_fail_together_count_as_one_failure(stage_with: StartProxyEnvironment) -> None:
    """A short failure while many calls are in progress is retried, and no caller gets an error."""
    stage = stage_with("--model-batch-size", "10", *UNLIMITED_RATE_FLAGS)
    barrier = threading.Barrier(8)

    def fail_first_calls(call: ReceivedCall) -> Answers:
        if call.number < 8:
            barrier.wait(20)
            raise AbortCallError(StatusCode.UNAVAILABLE, "a short failure")
        return answer_all(call)

    stage.model.behaviour = fail_first_calls
    pairs = make_pairs("short failure", 80)
    started_at = time.monotonic()
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]
    # The backoff is that of one failure, not of eight.
    assert time.monotonic() - started_at < 3
    # The log is complete only after the process has ended.
    assert stage.proxy.stop() == 0
    assert stage.proxy.log.count("WARNING") == 1


def test_pushback_of_the_model_delays_the_next_call(stage_with: StartProxyEnvironment) -> None:
    """After a pushback of 700 ms, the model is not called before they have passed."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)

    def push_back(call: ReceivedCall) -> Answers:
        if call.number == 0:
            raise AbortCallError(StatusCode.RESOURCE_EXHAUSTED, "later", (("grpc-retry-pushback-ms", "700"),))
        return answer_all(call)

    stage.model.behaviour = push_back
    assert stage.caller.infer([("pushback", "t")]).code is StatusCode.OK
    first, second = stage.model.calls
    assert second.monotonic_seconds - first.monotonic_seconds >= 0.7


def test_hanging_call_ends_at_the_model_deadline_and_is_retried(stage_with: StartProxyEnvironment) -> None:
    """`--model-deadline` ends a call that is never answered, and the pair is sent again."""
    stage = stage_with("--model-deadline", "300ms", *UNLIMITED_RATE_FLAGS)
    release = threading.Event()

    def hang_once(call: ReceivedCall) -> Answers:
        if call.number == 0:
            release.wait(20)
        return answer_all(call)

    stage.model.behaviour = hang_once
    assert stage.caller.infer([("hangs", "t")]).levels == [scripted_level("hangs", "t")]
    release.set()


def test_deadline_of_the_caller_ends_its_wait_and_the_level_is_cached_later(stage: ProxyEnvironment) -> None:
    """The caller gets DEADLINE_EXCEEDED. A level that arrives later is cached."""
    release = threading.Event()

    def slow(call: ReceivedCall) -> Answers:
        release.wait(20)
        return answer_all(call)

    stage.model.behaviour = slow
    reply = stage.caller.infer([("deadline", "t")], timeout_seconds=0.5)
    assert reply.code is StatusCode.DEADLINE_EXCEEDED
    release.set()
    wait_for(lambda: _reply_is_cached(stage, ("deadline", "t")), description="the late answer is cached")
    assert len(stage.model.received_pairs("deadline")) == 1


def test_max_wait_ends_the_wait_of_a_caller_without_deadline(stage_with: StartProxyEnvironment) -> None:
    """A caller without a deadline waits for `--max-wait`, then gets DEADLINE_EXCEEDED."""
    stage = stage_with("--max-wait", "400ms", *UNLIMITED_RATE_FLAGS)
    release = threading.Event()

    def slow(call: ReceivedCall) -> Answers:
        release.wait(20)
        return answer_all(call)

    stage.model.behaviour = slow
    started_at = time.monotonic()
    reply = stage.caller.infer([("max wait", "t")], timeout_seconds=None)
    release.set()
    assert reply.code is StatusCode.DEADLINE_EXCEEDED
    assert 0.4 <= time.monotonic() - started_at < 10


def _queued(proxy: ServiceProcess) -> float:
    return read_metrics(proxy.http_url)[("cache_proxy_queue_pairs", "interactive")]


def _reply_is_cached(stage: ProxyEnvironment, pair: tuple[str, str]) -> bool:
    reply = stage.caller.infer([pair], timeout_seconds=1)
    return reply.code is grpc.StatusCode.OK and reply.hits == 1
