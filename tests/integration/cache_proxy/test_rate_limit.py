"""The limit as the model sees it, full batches, linger, priorities."""

import signal
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from statistics import quantiles

import pytest
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, StartProxyEnvironment
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import AbortCallError, Answers, ReceivedCall, answer_all
from tests.support.processes import cache_proxy, model_stub, read_stub_log
from tests.support.redis_server import wait_for

pytestmark = pytest.mark.alone
_CALLS_EVERY_HALF_SECOND = ("--model-calls-per-second", "2", "--model-rate", "2000")
_FOUR_CALLS_A_SECOND = {
    "calls": ("--model-calls-per-second", "4", "--model-rate", "1000000", "--model-batch-size", "200"),
    "pairs": ("--model-calls-per-second", "0", "--model-rate", "800", "--model-batch-size", "200"),
}


def _too_early(arrivals: Iterable[float], *, since: float, apart: float) -> list[int]:
    """Which of the full batches that were sent after `since` came before the limit allows.

    In a window that begins at `since` one may come at once and each further one `apart` later. A machine
    that stalls only has them seen later: it can hide a call that is too early, but never make one.
    """
    return [number for number, at in enumerate(sorted(arrivals)) if at < since + number * apart]


def _apart(calls: list[ReceivedCall]) -> float:
    """How far calls are apart of which the machine took nothing: the lower quartile."""
    return quantiles(
        [later.monotonic_seconds - earlier.monotonic_seconds for earlier, later in pairwise(calls)]
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["calls", "pairs"])
def test_idle_time_is_not_saved_up(limit: str, stage_with: StartProxyEnvironment) -> None:
    """After a second without a miss a backlog gets one batch at once, and each further one in its turn."""
    stage = stage_with(*_FOUR_CALLS_A_SECOND[limit])
    assert stage.caller.infer(make_pairs("first", 200)).code is StatusCode.OK
    time.sleep(1)
    asked_at = time.monotonic()
    assert stage.caller.infer(make_pairs("backlog", 1000)).code is StatusCode.OK
    calls = stage.model.calls_with("backlog")
    assert [len(call.pairs) for call in calls] == [200] * 5
    assert not _too_early((call.monotonic_seconds for call in calls), since=asked_at, apart=0.25)


@pytest.mark.slow
def test_a_proxy_that_stood_still_does_not_catch_up(stage_with: StartProxyEnvironment) -> None:
    """Stopped for three slots under a backlog: they are lost, and those that follow keep their distance."""
    stage = stage_with(*_CALLS_EVERY_HALF_SECOND)
    waiting = stage.caller.start_infer(make_pairs("backlog", 5000))
    wait_for(
        lambda: len(stage.model.calls) == 2, description="two calls"
    )  # so the next is half a second away
    stage.proxy.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    before = len(stage.model.calls)
    resumed_at = time.monotonic()
    stage.proxy.process.send_signal(signal.SIGCONT)
    assert waiting.result().code is StatusCode.OK
    calls = stage.model.calls[before:]
    assert len(calls) >= 2
    assert not _too_early((call.monotonic_seconds for call in calls), since=resumed_at, apart=0.5)


def test_the_limit_begins_as_just_spent(stage_with: StartProxyEnvironment) -> None:
    """A start is no free call: at one in a hundred seconds, a caller with twenty is told so."""
    stage = stage_with("--model-calls-per-second", "0.01")
    assert stage.caller.infer([("early", "t")], timeout_seconds=20).code is StatusCode.RESOURCE_EXHAUSTED
    assert not stage.model.calls


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["calls", "pairs"])
def test_a_backlog_uses_the_rate(limit: str, stage_with: StartProxyEnvironment) -> None:
    """Every batch is full, and they follow each other at 97 % of the rate or more; what the machine takes
    from single ones is not held against the proxy, as long as no quarter of the slots is lost.
    """  # noqa: D205 - one thought
    stage = stage_with(*_FOUR_CALLS_A_SECOND[limit])
    asked_at = time.monotonic()
    assert stage.caller.infer(make_pairs("backlog", 3200)).code is StatusCode.OK
    calls = stage.model.calls
    assert [len(call.pairs) for call in calls] == [200] * 16
    assert not _too_early((call.monotonic_seconds for call in calls), since=asked_at, apart=0.25)
    assert _apart(calls) <= 0.25 / 0.97
    assert calls[-1].monotonic_seconds - calls[0].monotonic_seconds <= 15 * 0.25 / 0.75


@pytest.mark.slow
def test_the_limit_holds_while_the_cache_is_hammered(tmp_path: Path) -> None:
    """A proxy busy with hits neither passes the limit nor starves the model, by the model's own log."""
    log = tmp_path / "calls.jsonl"
    with (
        model_stub("--rate", "0", "--latency", "0s", "--log", str(log)) as stub,
        cache_proxy(
            "--model-target", stub.target, "--cache-url", "memory:", *_CALLS_EVERY_HALF_SECOND
        ) as proxy,
        open_caller(proxy.target) as asking,
        open_caller(proxy.target) as busy,
    ):
        known = make_pairs("known", 200)
        assert asking.infer(known).code is StatusCode.OK
        asked_at = time.time()
        waiting = asking.start_infer(make_pairs("backlog", 6000))
        while not waiting.done:
            asked = [busy.start_infer(known * 25) for _ in range(2)]
            assert all(one.result().hits == 5000 for one in asked)
        assert waiting.result().code is StatusCode.OK
    at = [call["at"] for call in read_stub_log(log)[1:]]
    assert len(at) == 6
    assert not _too_early(at, since=asked_at, apart=0.5)
    # How punctual it is depends on what time the machine has to spare; half of the slots there is always.
    assert at[-1] - at[0] <= 5 * 0.5 / 0.5


@pytest.mark.slow
def test_batches_that_nothing_limits_do_not_make_each_other_late(stage_with: StartProxyEnvironment) -> None:
    """Fifty at once, which take longer than one may take to the model, are all sent in turn."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    assert stage.caller.infer(make_pairs("many", 50_000), timeout_seconds=60).code is StatusCode.OK
    assert len(stage.model.received_pairs()) == 50_000


@pytest.mark.slow
def test_expected_replicas_divide_the_rate(stage_with: StartProxyEnvironment) -> None:
    """Each of four takes a quarter."""
    stage = stage_with(
        "--model-calls-per-second",
        "20",
        "--model-rate",
        "4000",
        "--model-batch-size",
        "100",
        "--expected-replicas",
        "4",
    )
    asked_at = time.monotonic()
    assert stage.caller.infer(make_pairs("quarter", 800)).code is StatusCode.OK
    calls = stage.model.calls
    assert not _too_early((call.monotonic_seconds for call in calls), since=asked_at, apart=0.2)
    assert _apart(calls) < 0.4  # as an eighth would be


def test_misses_share_a_call_and_a_full_batch_does_not_linger(stage_with: StartProxyEnvironment) -> None:
    """Callers within the linger share a call, which goes as soon as it is full."""
    stage = stage_with("--model-batch-size", "100", *UNLIMITED_RATE_FLAGS, "--linger", "60s")
    asked = [
        stage.caller.start_infer(make_pairs(f"company {number}", 5), timeout_seconds=30)
        for number in range(20)
    ]
    assert all(one.result().code is StatusCode.OK for one in asked)
    assert len(stage.model.calls) == 1


def test_a_lone_miss_waits_for_company_no_longer_than_the_linger(stage_with: StartProxyEnvironment) -> None:
    """It goes alone when the linger is over, and not before."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS, "--linger", "700ms")
    started_at = time.monotonic()
    assert stage.caller.infer([("alone", "t")], timeout_seconds=30).code is StatusCode.OK
    assert stage.model.calls[0].monotonic_seconds - started_at >= 0.7


@pytest.mark.slow
def test_a_batch_closes_at_its_bytes(stage_with: StartProxyEnvironment) -> None:
    """No message to the model is over `--model-batch-bytes`, and pairs that fit go together."""
    stage = stage_with("--model-batch-bytes", "20KiB", *UNLIMITED_RATE_FLAGS)
    pairs = [(f"{number} {'é' * 400}", "x" * 200) for number in range(100)]
    assert stage.caller.infer(pairs).code is StatusCode.OK
    sizes = [call.message_bytes for call in stage.model.calls]
    assert max(sizes) <= 20 * 1024
    assert len(sizes) <= 6
    alone = ("y" * 4096, "z" * 4096)
    small = stage_with("--model-batch-bytes", "4KiB", *UNLIMITED_RATE_FLAGS)
    assert small.caller.infer([alone, ("b", "t")]).code is StatusCode.OK


def test_interactive_goes_first_and_bulk_keeps_its_tenth(stage_with: StartProxyEnvironment) -> None:
    """Bulk that came first lets interactive pass, but for a tenth of each batch."""
    stage = stage_with("--model-batch-size", "100", *UNLIMITED_RATE_FLAGS)

    def not_yet(call: ReceivedCall) -> Answers:
        if call.number == 0:  # nothing is sent for three seconds: time for all of them to come
            raise AbortCallError(
                StatusCode.RESOURCE_EXHAUSTED, "not yet", (("grpc-retry-pushback-ms", "3000"),)
            )
        return answer_all(call)

    def wait(priority: str, pairs: int) -> None:
        waiting = "cache_proxy_queue_pairs", priority
        wait_for(
            lambda: read_metrics(stage.proxy.http_url)[waiting] == pairs,
            description=f"{pairs} {priority} pairs wait",
        )

    stage.model.behaviour = not_yet
    asked = [stage.caller.start_infer([("quick opening", "t")])]
    wait_for(lambda: stage.model.calls, description="the first call")
    wait("interactive", 1)  # again
    asked.append(stage.caller.start_infer(make_pairs("bulk", 300), metadata=[("x-priority", "bulk")]))
    wait("bulk", 300)
    asked.append(stage.caller.start_infer(make_pairs("quick", 179)))
    wait("interactive", 180)
    assert all(one.result().code is StatusCode.OK for one in asked)
    calls = stage.model.calls[1:]
    assert sorted(len(call.pairs) for call in calls) == [80, 100, 100, 100, 100]
    shares = [sum(company.startswith("quick") for company, _ in call.pairs) for call in calls]
    assert sorted(shares) == [0, 0, 0, 90, 90]


@pytest.mark.slow
def test_the_default_limit_is_one_batch_of_a_thousand_a_second(stage_with: StartProxyEnvironment) -> None:
    """As the model sustains it: with the flags' own defaults, eight full batches take eight seconds."""
    stage = stage_with()
    asked_at = time.monotonic()
    assert stage.caller.infer(make_pairs("default", 8000)).code is StatusCode.OK
    calls = stage.model.calls
    assert [len(call.pairs) for call in calls] == [1000] * 8
    assert not _too_early((call.monotonic_seconds for call in calls), since=asked_at, apart=1)
    assert _apart(calls) <= 1 / 0.97
    assert calls[-1].monotonic_seconds - calls[0].monotonic_seconds <= 7 / 0.9
