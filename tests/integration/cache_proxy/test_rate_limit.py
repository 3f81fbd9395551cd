"""The rate limit as the model sees it, full batches, linger and priorities."""

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
    """Return the numbers of the full batches that came before the limit allows.

    In a window that begins at `since`, one may come at once and each further one `apart` seconds later. A
    machine that stalls delays arrivals: it can hide a call that is too early, but never cause one.
    """
    return [number for number, at in enumerate(sorted(arrivals)) if at < since + number * apart]


def _lower_quartile_gap(calls: list[ReceivedCall]) -> float:
    """Return the lower quartile of the gaps between calls: those that the machine did not delay."""
    return quantiles(
        [later.monotonic_seconds - earlier.monotonic_seconds for earlier, later in pairwise(calls)]
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["calls", "pairs"])
def test_idle_time_is_not_saved_up(limit: str, stage_with: StartProxyEnvironment) -> None:
    """After a second without a miss, a backlog gets one batch at once. Each further one has to wait."""
    stage = stage_with(*_FOUR_CALLS_A_SECOND[limit])
    assert stage.caller.infer(make_pairs("first", 200)).code is StatusCode.OK
    time.sleep(1)
    requested_at = time.monotonic()
    assert stage.caller.infer(make_pairs("backlog", 1000)).code is StatusCode.OK
    calls = stage.model.calls_with("backlog")
    assert [len(call.pairs) for call in calls] == [200] * 5
    assert not _too_early((call.monotonic_seconds for call in calls), since=requested_at, apart=0.25)


@pytest.mark.slow
def test_stopped_proxy_does_not_catch_up(stage_with: StartProxyEnvironment) -> None:
    """Slots during the stop are lost, and later calls keep their distance."""
    stage = stage_with(*_CALLS_EVERY_HALF_SECOND)
    waiting = stage.caller.start_infer(make_pairs("backlog", 5000))
    # The next call is half a second away then.
    wait_for(lambda: len(stage.model.calls) == 2, description="two calls")
    stage.proxy.process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    before = len(stage.model.calls)
    resumed_at = time.monotonic()
    stage.proxy.process.send_signal(signal.SIGCONT)
    assert waiting.result().code is StatusCode.OK
    calls = stage.model.calls[before:]
    assert len(calls) >= 2
    assert not _too_early((call.monotonic_seconds for call in calls), since=resumed_at, apart=0.5)


def test_limit_starts_fully_spent(stage_with: StartProxyEnvironment) -> None:
    """A start gives no free call: at one call in 100 s, a caller with 20 s is rejected."""
    stage = stage_with("--model-calls-per-second", "0.01")
    assert stage.caller.infer([("early", "t")], timeout_seconds=20).code is StatusCode.RESOURCE_EXHAUSTED
    assert not stage.model.calls


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["calls", "pairs"])
def test_backlog_uses_at_least_97_percent_of_rate(limit: str, stage_with: StartProxyEnvironment) -> None:
    """Every batch is full. Calls that the machine delays do not count, up to a quarter of the slots."""
    stage = stage_with(*_FOUR_CALLS_A_SECOND[limit])
    requested_at = time.monotonic()
    assert stage.caller.infer(make_pairs("backlog", 3200)).code is StatusCode.OK
    calls = stage.model.calls
    assert [len(call.pairs) for call in calls] == [200] * 16
    assert not _too_early((call.monotonic_seconds for call in calls), since=requested_at, apart=0.25)
    assert _lower_quartile_gap(calls) <= 0.25 / 0.97
    assert calls[-1].monotonic_seconds - calls[0].monotonic_seconds <= 15 * 0.25 / 0.75


@pytest.mark.slow
def test_limit_holds_under_load_of_cache_hits(tmp_path: Path) -> None:
    """The proxy neither exceeds the limit nor leaves the model idle, by the model's own log."""
    log = tmp_path / "calls.jsonl"
    with (
        model_stub("--rate", "0", "--latency", "0s", "--log", str(log)) as stub,
        cache_proxy(
            "--model-target", stub.target, "--cache-url", "memory:", *_CALLS_EVERY_HALF_SECOND
        ) as proxy,
        open_caller(proxy.target) as caller,
        open_caller(proxy.target) as busy_caller,
    ):
        known = make_pairs("known", 200)
        assert caller.infer(known).code is StatusCode.OK
        requested_at = time.time()
        waiting = caller.start_infer(make_pairs("backlog", 6000))
        while not waiting.done:
            replies = [busy_caller.start_infer(known * 25) for _ in range(2)]
            assert all(one.result().hits == 5000 for one in replies)
        assert waiting.result().code is StatusCode.OK
    at = [call["at"] for call in read_stub_log(log)[1:]]
    assert len(at) == 6
    assert not _too_early(at, since=requested_at, apart=0.5)
    # The machine may delay calls. At least half of the slots are used.
    assert at[-1] - at[0] <= 5 * 0.5 / 0.5


@pytest.mark.slow
def test_unlimited_batches_are_all_sent(stage_with: StartProxyEnvironment) -> None:
    """Fifty batches take longer together than one may be late, and are sent in turn."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    assert stage.caller.infer(make_pairs("many", 50_000), timeout_seconds=60).code is StatusCode.OK
    assert len(stage.model.received_pairs()) == 50_000


@pytest.mark.slow
def test_expected_replicas_divide_rate(stage_with: StartProxyEnvironment) -> None:
    """One of four expected replicas takes a quarter."""
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
    requested_at = time.monotonic()
    assert stage.caller.infer(make_pairs("quarter", 800)).code is StatusCode.OK
    calls = stage.model.calls
    assert not _too_early((call.monotonic_seconds for call in calls), since=requested_at, apart=0.2)
    # An eighth of the rate would be 0.4 s.
    assert _lower_quartile_gap(calls) < 0.4


def test_misses_within_linger_share_one_call(stage_with: StartProxyEnvironment) -> None:
    """The call is sent as soon as it is full."""
    stage = stage_with("--model-batch-size", "100", *UNLIMITED_RATE_FLAGS, "--linger", "60s")
    replies = [
        stage.caller.start_infer(make_pairs(f"company {number}", 5), timeout_seconds=30)
        for number in range(20)
    ]
    assert all(one.result().code is StatusCode.OK for one in replies)
    assert len(stage.model.calls) == 1


def test_single_miss_is_sent_when_linger_ends(stage_with: StartProxyEnvironment) -> None:
    """It is not sent before."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS, "--linger", "700ms")
    started_at = time.monotonic()
    assert stage.caller.infer([("alone", "t")], timeout_seconds=30).code is StatusCode.OK
    assert stage.model.calls[0].monotonic_seconds - started_at >= 0.7


@pytest.mark.slow
def test_batch_size_in_bytes_is_limited(stage_with: StartProxyEnvironment) -> None:
    """No request is larger than `--model-batch-bytes`, and pairs that fit go together."""
    stage = stage_with("--model-batch-bytes", "20KiB", *UNLIMITED_RATE_FLAGS)
    pairs = [(f"{number} {'é' * 400}", "x" * 200) for number in range(100)]
    assert stage.caller.infer(pairs).code is StatusCode.OK
    sizes = [call.message_bytes for call in stage.model.calls]
    assert max(sizes) <= 20 * 1024
    assert len(sizes) <= 6
    alone = ("y" * 4096, "z" * 4096)
    small = stage_with("--model-batch-bytes", "4KiB", *UNLIMITED_RATE_FLAGS)
    assert small.caller.infer([alone, ("b", "t")]).code is StatusCode.OK


def test_interactive_goes_first_and_bulk_keeps_its_reserve(stage_with: StartProxyEnvironment) -> None:
    """Earlier bulk pairs let interactive ones pass, except for a tenth of each batch."""
    stage = stage_with("--model-batch-size", "100", *UNLIMITED_RATE_FLAGS)

    def not_yet(call: ReceivedCall) -> Answers:
        # Nothing is sent for three seconds, so that all requests arrive meanwhile.
        if call.number == 0:
            raise AbortCallError(
                StatusCode.RESOURCE_EXHAUSTED, "not yet", (("grpc-retry-pushback-ms", "3000"),)
            )
        return answer_all(call)

    def wait_for_queue(priority: str, pairs: int) -> None:
        waiting = "cache_proxy_queue_pairs", priority
        wait_for(
            lambda: read_metrics(stage.proxy.http_url)[waiting] == pairs,
            description=f"{pairs} {priority} pairs wait",
        )

    stage.model.behaviour = not_yet
    replies = [stage.caller.start_infer([("quick opening", "t")])]
    wait_for(lambda: stage.model.calls, description="the first call")
    # The pair of the failed call waits again.
    wait_for_queue("interactive", 1)
    replies.append(stage.caller.start_infer(make_pairs("bulk", 300), metadata=[("x-priority", "bulk")]))
    wait_for_queue("bulk", 300)
    replies.append(stage.caller.start_infer(make_pairs("quick", 179)))
    wait_for_queue("interactive", 180)
    assert all(one.result().code is StatusCode.OK for one in replies)
    calls = stage.model.calls[1:]
    assert sorted(len(call.pairs) for call in calls) == [80, 100, 100, 100, 100]
    shares = [sum(company.startswith("quick") for company, _ in call.pairs) for call in calls]
    assert sorted(shares) == [0, 0, 0, 90, 90]


@pytest.mark.slow
def test_default_limit_is_one_batch_of_1000_pairs_a_second(stage_with: StartProxyEnvironment) -> None:
    """With the default flags, eight full batches take eight seconds."""
    stage = stage_with()
    requested_at = time.monotonic()
    assert stage.caller.infer(make_pairs("default", 8000)).code is StatusCode.OK
    calls = stage.model.calls
    assert [len(call.pairs) for call in calls] == [1000] * 8
    assert not _too_early((call.monotonic_seconds for call in calls), since=requested_at, apart=1)
    assert _lower_quartile_gap(calls) <= 1 / 0.97
    assert calls[-1].monotonic_seconds - calls[0].monotonic_seconds <= 7 / 0.9
