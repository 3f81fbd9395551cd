"""Callers who want the same pairs at the same time, and callers who go away."""

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


class Held:
    """A model that answers when it is let."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, call: ReceivedCall) -> Answers:
        """Wait, then answer."""
        self.go.wait(30)
        return answer_all(call)


def test_concurrent_callers_of_the_same_pairs_cost_one_inference_each(
    stage_with: StartProxyEnvironment,
) -> None:
    """Twelve connections ask for 2,500 pairs in orders of their own: three calls, each pair in one."""
    stage = stage_with("--model-calls-per-second", "4", "--model-rate", "100000", "--linger", "200ms")
    pairs = make_pairs("same", 2500)
    callers = [open_caller(stage.proxy.target) for _ in range(12)]
    asking = [one.__enter__() for one in callers]
    orders = [random.Random(seed).sample(pairs, len(pairs)) for seed in range(12)]
    asked = [one.start_infer(order) for one, order in zip(asking, orders, strict=True)]
    for order, one in zip(orders, asked, strict=True):
        assert one.result().levels == [scripted_level(*pair) for pair in order]
    assert sorted(stage.model.received_pairs()) == sorted(pairs)
    assert [len(call.pairs) for call in stage.model.calls] == [1000, 1000, 500]
    found = read_metrics(stage.proxy.http_url)
    assert found["cache_proxy_pairs_total", "inferred"] == 2500


def test_a_caller_that_goes_costs_the_others_nothing(stage: ProxyEnvironment) -> None:
    """The first to ask cancels, another's deadline passes: who is left gets every answer, inferred once."""
    held = stage.model.behaviour = Held()
    pairs = make_pairs("goes", 50)
    first = stage.caller.start_infer(pairs)
    wait_for(lambda: stage.model.calls_with("goes"), description="the call is at the model")
    stays = [stage.caller.start_infer(pairs) for _ in range(3)]
    late = stage.caller.start_infer(pairs, timeout_seconds=0.3)
    assert late.result().code is StatusCode.DEADLINE_EXCEEDED
    first.cancel()
    held.go.set()
    for one in stays:
        assert one.result().levels == [scripted_level(*pair) for pair in pairs]
    assert sorted(stage.model.received_pairs("goes")) == sorted(pairs)


def test_the_last_to_go_takes_unsent_pairs_along(stage_with: StartProxyEnvironment) -> None:
    """While one of two still waits they stay queued; when both are gone the model never hears of them."""
    stage = stage_with("--model-batch-size", "100", *UNLIMITED_RATE_FLAGS, "--linger", "60s")
    pairs = make_pairs("unsent", 40)
    asked = [stage.caller.start_infer(pairs), stage.caller.start_infer(pairs)]
    queued = "cache_proxy_queue_pairs", "interactive"
    wait_for(lambda: read_metrics(stage.proxy.http_url)[queued] == 40, description="40 pairs wait")
    asked[0].cancel()
    wait_for(
        lambda: read_metrics(stage.proxy.http_url).get(("cache_proxy_requests_total", "CANCELLED")) == 1,
        description="the first is gone",
    )
    assert read_metrics(stage.proxy.http_url)[queued] == 40
    asked[1].cancel()
    wait_for(lambda: read_metrics(stage.proxy.http_url)[queued] == 0, description="nothing waits")
    assert stage.caller.infer(make_pairs("other", 100)).code is StatusCode.OK  # full, so it goes at once
    assert not stage.model.received_pairs("unsent")


def test_a_bad_pair_of_one_caller_is_not_anothers(stage: ProxyEnvironment) -> None:
    """Two callers whose pairs share a batch: one's bad pair fails that one alone."""
    held = Held()

    def behave(call: ReceivedCall) -> Answers:
        if any("wrong" in company for company, _ in call.pairs):
            held.go.wait(30)
            raise AbortCallError(StatusCode.INVALID_ARGUMENT, "wrong")
        return answer_all(call)

    stage.model.behaviour = behave
    bad = stage.caller.start_infer([("shared wrong", "t"), *make_pairs("shared mine", 20)])
    others = [stage.caller.start_infer(make_pairs(f"shared {number}", 20)) for number in range(5)]
    held.go.set()
    assert bad.result().code is StatusCode.INVALID_ARGUMENT
    assert all(one.result().code is StatusCode.OK for one in others)


def test_a_storm_of_callers_that_come_and_go_leaves_nothing_behind(stage_with: StartProxyEnvironment) -> None:
    """Random overlapping batches, a third of them cancelled or given little time: every answer that is
    given is right, and afterwards nothing waits and no pair was inferred twice.
    """  # noqa: D205 - one thought
    stage = stage_with("--model-batch-size", "50", *UNLIMITED_RATE_FLAGS)
    chance = random.Random(3)
    pairs = make_pairs("storm", 800)
    asked = []
    for number in range(150):
        batch = chance.sample(pairs, chance.randint(1, 60))
        one = stage.caller.start_infer(batch, timeout_seconds=0.02 if number % 3 == 1 else 30)
        asked.append((batch, one))
        if number % 3 == 2:
            chance.choice(asked)[1].cancel()
    for batch, one in asked:
        reply = one.result()
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
