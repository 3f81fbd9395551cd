"""Concurrent callers of the same pairs share inferences, also when some of the callers cancel."""

import random
import threading

from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import AbortCallError, Answers, ReceivedCall, answer_all, scripted_level
from tests.support.redis_server import wait_for


class BlockedModel:
    """A behaviour that answers once `unblock` is set."""

    def __init__(self) -> None:
        self.unblock = threading.Event()

    def __call__(self, call: ReceivedCall) -> Answers:
        """Wait until `unblock` is set, then answer."""
        self.unblock.wait(30)
        return answer_all(call)


def test_concurrent_callers_of_the_same_pairs_cause_one_inference_each(
    stage_with: StartProxyEnvironment,
) -> None:
    """Twelve callers send the same 2,500 pairs in different orders: three calls, each pair in one of them."""
    stage = stage_with("--model-calls-per-second", "4", "--model-rate", "100000", "--linger", "200ms")
    pairs = make_pairs("same", 2500)
    callers = [open_caller(stage.proxy.target) for _ in range(12)]
    opened = [caller.__enter__() for caller in callers]
    orders = [random.Random(seed).sample(pairs, len(pairs)) for seed in range(12)]
    rpcs = [caller.start_infer(order) for caller, order in zip(opened, orders, strict=True)]
    for order, rpc in zip(orders, rpcs, strict=True):
        assert rpc.result().levels == [scripted_level(*pair) for pair in order]
    assert sorted(stage.model.received_pairs()) == sorted(pairs)
    assert [len(call.pairs) for call in stage.model.calls] == [1000, 1000, 500]
    found = read_metrics(stage.proxy.http_url)
    assert found["cache_proxy_pairs_total", "inferred"] == 2500


def test_caller_that_cancels_does_not_affect_the_others(stage: ProxyEnvironment) -> None:
    """The first caller cancels and another's deadline passes: the others get all answers, inferred once."""
    model = stage.model.behaviour = BlockedModel()
    pairs = make_pairs("goes", 50)
    first = stage.caller.start_infer(pairs)
    wait_for(lambda: stage.model.calls_with("goes"), description="the call is at the model")
    remaining = [stage.caller.start_infer(pairs) for _ in range(3)]
    late = stage.caller.start_infer(pairs, timeout_seconds=0.3)
    assert late.result().code is StatusCode.DEADLINE_EXCEEDED
    first.cancel()
    model.unblock.set()
    for rpc in remaining:
        assert rpc.result().levels == [scripted_level(*pair) for pair in pairs]
    assert sorted(stage.model.received_pairs("goes")) == sorted(pairs)


def test_unsent_pairs_are_dropped_when_the_last_caller_cancels(stage_with: StartProxyEnvironment) -> None:
    """They stay queued while one of two callers waits. When both have cancelled, they are never sent."""
    stage = stage_with("--model-batch-size", "100", *UNLIMITED_RATE_FLAGS, "--linger", "60s")
    pairs = make_pairs("unsent", 40)
    rpcs = [stage.caller.start_infer(pairs), stage.caller.start_infer(pairs)]
    queued = "cache_proxy_queue_pairs", "interactive"
    wait_for(lambda: read_metrics(stage.proxy.http_url)[queued] == 40, description="40 pairs wait")
    rpcs[0].cancel()
    wait_for(
        lambda: read_metrics(stage.proxy.http_url).get(("cache_proxy_requests_total", "CANCELLED")) == 1,
        description="the first is gone",
    )
    assert read_metrics(stage.proxy.http_url)[queued] == 40
    rpcs[1].cancel()
    wait_for(lambda: read_metrics(stage.proxy.http_url)[queued] == 0, description="nothing waits")
    # A full batch is sent at once.
    assert stage.caller.infer(make_pairs("other", 100)).code is StatusCode.OK
    assert not stage.model.received_pairs("unsent")


def test_bad_pair_of_one_caller_does_not_fail_another(stage: ProxyEnvironment) -> None:
    """Pairs of several callers share a batch: a bad pair fails only the RPC that contains it."""
    model = BlockedModel()

    def behave(call: ReceivedCall) -> Answers:
        if any("wrong" in company for company, _ in call.pairs):
            model.unblock.wait(30)
            raise AbortCallError(StatusCode.INVALID_ARGUMENT, "wrong")
        return answer_all(call)

    stage.model.behaviour = behave
    bad = stage.caller.start_infer([("shared wrong", "t"), *make_pairs("shared mine", 20)])
    others = [stage.caller.start_infer(make_pairs(f"shared {number}", 20)) for number in range(5)]
    model.unblock.set()
    assert bad.result().code is StatusCode.INVALID_ARGUMENT
    assert all(rpc.result().code is StatusCode.OK for rpc in others)


def test_many_callers_that_cancel_or_time_out_leave_nothing_queued(stage_with: StartProxyEnvironment) -> None:
    """A third of many overlapping requests is cancelled, another third has a short deadline.

    All answers are right. Afterwards nothing is queued, and no pair was inferred twice.
    """
    stage = stage_with("--model-batch-size", "50", *UNLIMITED_RATE_FLAGS)
    rng = random.Random(3)
    pairs = make_pairs("storm", 800)
    rpcs = []
    for number in range(150):
        batch = rng.sample(pairs, rng.randint(1, 60))
        timeout_seconds = 0.02 if number % 3 == 1 else 30
        rpcs.append((batch, stage.caller.start_infer(batch, timeout_seconds=timeout_seconds)))
        if number % 3 == 2:
            rng.choice(rpcs)[1].cancel()
    for batch, rpc in rpcs:
        reply = rpc.result()
        if reply.code is StatusCode.OK:
            assert reply.levels == [scripted_level(*pair) for pair in batch]
        else:
            late = {StatusCode.DEADLINE_EXCEEDED, StatusCode.RESOURCE_EXHAUSTED}
            assert reply.code in {StatusCode.CANCELLED, *late}
    reply = stage.caller.infer(pairs)
    assert reply.levels == [scripted_level(*pair) for pair in pairs]
    assert len(stage.model.received_pairs()) == len(set(stage.model.received_pairs())) == len(pairs)
    found = read_metrics(stage.proxy.http_url)
    assert found["cache_proxy_queue_pairs", "interactive"] == 0
