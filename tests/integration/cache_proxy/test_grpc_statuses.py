"""Every row of the table of statuses, as a caller sees it."""

import threading
import time
from pathlib import Path

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
    Trailers,
    answer_all,
    bad_request_details,
    scripted_level,
)
from tests.support.processes import ServiceProcess
from tests.support.redis_server import free_port, wait_for

REFUSALS = [StatusCode.INVALID_ARGUMENT, StatusCode.OUT_OF_RANGE, StatusCode.FAILED_PRECONDITION]


class Refusing:
    """A model that refuses any batch with a company that holds one of `bad`."""

    def __init__(
        self, *bad: str, code: StatusCode = StatusCode.INVALID_ARGUMENT, named: bool = False, said: str = "no"
    ) -> None:
        self._bad, self._code, self._named, self._said = bad, code, named, said

    def __call__(self, call: ReceivedCall) -> Answers:
        """Refuse or answer."""
        for index, (company, _) in enumerate(call.pairs):
            if any(bad in company for bad in self._bad):
                trailers: Trailers = (
                    bad_request_details((f"batch[{index}].company", "bad word")) if self._named else ()
                )
                raise AbortCallError(self._code, self._said, trailers)
        return answer_all(call)


def test_too_many_pairs_name_the_index_and_the_limit(stage_with: StartProxyEnvironment) -> None:
    """One pair over `--max-request-pairs` refuses the RPC; as many as allowed pass.

    The details name the batch, not a pair: without that pair, the rest would be refused again.
    """
    stage = stage_with("--max-request-pairs", "10", *UNLIMITED_RATE_FLAGS)
    assert stage.caller.infer(make_pairs("fits", 10)).code is StatusCode.OK
    reply = stage.caller.infer(make_pairs("many", 11))
    assert reply.code is StatusCode.INVALID_ARGUMENT
    assert reply.message == "batch[10]: the batch holds 11 pairs, the limit is 10"
    assert list(reply.violations) == ["batch"]
    assert not stage.model.received_pairs("many")


@pytest.mark.parametrize("field", ["company", "title"])
def test_a_field_over_its_limit_is_named(stage: ProxyEnvironment, field: str) -> None:
    """4096 bytes of UTF-8 pass, one more does not, and bytes count, not characters."""
    fits, over = "é" * 2048, "é" * 2048 + "x"
    pairs = [(fits, fits), ("ok", "ok"), (over, "t") if field == "company" else ("c", over)]
    reply = stage.caller.infer(pairs)
    assert reply.code is StatusCode.INVALID_ARGUMENT
    assert f"batch[2].{field}" in reply.message
    assert "4096" in reply.message
    assert list(reply.violations) == [f"batch[2].{field}"]
    assert stage.caller.infer(pairs[:2]).code is StatusCode.OK


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("code", REFUSALS, ids=lambda code: code.name)
def test_a_refused_pair_fails_alone(stage: ProxyEnvironment, code: StatusCode, named: bool) -> None:
    """The caller gets the model's code and message and the pair's own index (repeats too); the others are
    answered and cached, so asking again for them, or for the bad pair, costs no call.
    """  # noqa: D205 - one thought
    company = f"refused {code.name} {named}"
    stage.model.behaviour = Refusing(f"{company} bad", code=code, named=named, said="the model's own words")
    good = make_pairs(f"{company} good", 60)
    bad = (f"{company} bad", "t")
    reply = stage.caller.infer([*good[:17], bad, *good[17:], bad])
    assert reply.code is code
    assert reply.message == "the model's own words"
    place = ".company" if named else ""
    assert reply.violations == {
        f"batch[{index}]{place}": "bad word" if named else "the model's own words" for index in (17, 61)
    }
    calls = len(stage.model.calls)
    again = stage.caller.infer(good)
    assert (again.levels, again.misses) == ([scripted_level(*pair) for pair in good], 0)
    alone = stage.caller.infer([bad])
    assert (alone.code, list(alone.violations)) == (code, [f"batch[0]{place}"])
    assert len(stage.model.calls) == calls


def test_refusals_are_listed_up_to_fifty(stage: ProxyEnvironment) -> None:
    """Metadata is small: of 70 refused pairs, 50 are listed, and all others are answered."""
    stage.model.behaviour = Refusing("fifty bad")
    bad, good = make_pairs("fifty bad", 70), make_pairs("fifty good", 30)
    reply = stage.caller.infer([*good, *bad])
    assert reply.code is StatusCode.INVALID_ARGUMENT
    assert list(reply.violations) == [f"batch[{index}]" for index in range(30, 80)]
    assert stage.caller.infer(good).hits == 30


@pytest.mark.parametrize(
    "said", ["悪" * 5000, "x" * 20_000, "\n" * 3000, ""], ids=["wide", "long", "lines", "none"]
)
def test_whatever_the_model_says_fits_into_the_metadata(stage: ProxyEnvironment, said: str) -> None:
    """A long message is cut; the status and the places arrive, for 60 refused pairs too."""
    company = f"said {len(said)}"
    stage.model.behaviour = Refusing(company, said=said[:1500])
    reply = stage.caller.infer(make_pairs(company, 60))
    assert reply.code is StatusCode.INVALID_ARGUMENT, reply.message
    assert "batch[0]" in reply.violations
    assert said.startswith(reply.message)


@pytest.mark.parametrize(
    "nonsense",
    ["missing", "zero", "eight", "negative", "contradicting", "unknown", "empty"],
)
def test_nonsense_is_internal_and_never_cached(stage: ProxyEnvironment, nonsense: str) -> None:
    """A pair without one level from 1 to 7 fails with INTERNAL and its index, and is asked again."""
    company = f"nonsense {nonsense}"
    bad = (f"{company} bad", "t")

    def behave(call: ReceivedCall) -> Answers:
        answers = []
        for uuid, pair in zip(call.ids, call.pairs, strict=True):
            level = scripted_level(*pair)
            if pair != bad:
                answers.append((uuid, level))
            elif nonsense in {"zero", "eight", "negative"}:
                answers.append((uuid, {"zero": 0, "eight": 8, "negative": -3}[nonsense]))
            elif nonsense == "contradicting":
                answers += [(uuid, level), (uuid, level % 7 + 1)]
            elif nonsense == "unknown":
                answers.append((uuid + 100_000, level))
        return [] if nonsense == "empty" else answers

    stage.model.behaviour = behave
    good = make_pairs(f"{company} good", 5)
    reply = stage.caller.infer([*good, bad])
    assert reply.code is StatusCode.INTERNAL
    assert "batch[5]" in reply.violations
    stage.model.behaviour = answer_all
    again = stage.caller.infer([*good, bad])
    assert again.levels == [scripted_level(*pair) for pair in [*good, bad]]
    assert again.misses == (6 if nonsense == "empty" else 1)


def test_the_same_answer_twice_is_no_contradiction(stage: ProxyEnvironment) -> None:
    """An answer repeated word for word is an answer."""
    stage.model.behaviour = lambda call: [*answer_all(call), *answer_all(call)]
    assert stage.caller.infer([("said again", "t")]).levels == [scripted_level("said again", "t")]


def test_a_full_queue_refuses_at_once_and_queues_nothing(stage_with: StartProxyEnvironment) -> None:
    """Beyond `--max-queued-pairs`: RESOURCE_EXHAUSTED with pushback while the others still wait, and the
    model never hears of them.
    """  # noqa: D205 - one thought
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
    fits = stage.caller.start_infer(make_pairs("fits", 20))  # with these the batch is full, and goes
    assert waiting.result().code is StatusCode.OK
    assert fits.result().code is StatusCode.OK
    assert not stage.model.received_pairs("refused")
    assert stage.caller.infer(make_pairs("room again", 100)).code is StatusCode.OK


def test_a_queue_full_by_bytes_refuses_too(stage_with: StartProxyEnvironment) -> None:
    """`--max-queued-bytes` counts the texts, and what has ended makes room again."""
    stage = stage_with("--max-queued-bytes", "10000", *UNLIMITED_RATE_FLAGS)
    long = [(f"{number} {'x' * 4000}", "t") for number in range(3)]
    reply = stage.caller.infer(long)
    assert reply.code is StatusCode.RESOURCE_EXHAUSTED
    assert "bytes" in reply.message
    assert (reply.pushback_ms or 0) >= 1000
    assert not stage.model.calls
    for pair in long:
        assert stage.caller.infer([pair]).code is StatusCode.OK


def test_a_deadline_before_its_turn_is_refused_at_once(stage_with: StartProxyEnvironment) -> None:
    """40,000 pairs at a batch a second cannot be answered in thirty seconds: nothing is queued."""
    stage = stage_with("--model-calls-per-second", "1")
    started_at = time.monotonic()
    reply = stage.caller.infer(make_pairs("late", 40_000), timeout_seconds=30)
    assert time.monotonic() - started_at < 15  # and not when they are over
    assert reply.code is StatusCode.RESOURCE_EXHAUSTED
    assert reply.pushback_ms is not None
    assert _queued(stage.proxy) == 0
    assert stage.caller.infer([("in time", "t")], timeout_seconds=30).code is StatusCode.OK
    assert not stage.model.received_pairs("late")


@pytest.mark.slow
def test_a_model_that_is_down_is_unavailable_and_recovers(stage_with: StartProxyEnvironment) -> None:
    """After the window: UNAVAILABLE with pushback and the places; new pairs are refused at once. Once the
    model answers, so does the proxy, after the pushback.
    """  # noqa: D205 - one thought
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
    assert stage.proxy.stop() == 0  # now its log is whole
    assert stage.proxy.log.count("WARNING") == 1


def test_a_model_that_nobody_serves_is_unavailable(stage_with: StartProxyEnvironment) -> None:
    """A refused connection reads like any model that is down; readiness stays green."""
    target = f"127.0.0.1:{free_port()}"
    stage = stage_with("--model-target", target, "--model-retry-window", "500ms", *UNLIMITED_RATE_FLAGS)
    reply = stage.caller.infer([("nobody", "t")])
    assert reply.code is StatusCode.UNAVAILABLE
    assert reply.pushback_ms
    assert read_metrics(stage.proxy.http_url)[("cache_proxy_requests_total", "UNAVAILABLE")] == 1


def test_one_failed_call_is_tried_again_for_everyone(stage_with: StartProxyEnvironment) -> None:
    """Calls that fail together are one failure: a blip under many calls in flight costs nobody an answer."""
    stage = stage_with("--model-batch-size", "10", *UNLIMITED_RATE_FLAGS)
    together = threading.Barrier(8)

    def blip(call: ReceivedCall) -> Answers:
        if call.number < 8:
            together.wait(20)
            raise AbortCallError(StatusCode.UNAVAILABLE, "a blip")
        return answer_all(call)

    stage.model.behaviour = blip
    pairs = make_pairs("blip", 80)
    started_at = time.monotonic()
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]
    assert time.monotonic() - started_at < 3  # a backoff of one failure, not of eight
    assert stage.proxy.stop() == 0  # now its log is whole
    assert stage.proxy.log.count("WARNING") == 1


def test_the_models_pushback_is_honoured(stage_with: StartProxyEnvironment) -> None:
    """A model that asks for 700 ms is not called before they are over."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)

    def push_back(call: ReceivedCall) -> Answers:
        if call.number == 0:
            raise AbortCallError(StatusCode.RESOURCE_EXHAUSTED, "later", (("grpc-retry-pushback-ms", "700"),))
        return answer_all(call)

    stage.model.behaviour = push_back
    assert stage.caller.infer([("pushback", "t")]).code is StatusCode.OK
    first, second = stage.model.calls
    assert second.monotonic_seconds - first.monotonic_seconds >= 0.7


def test_a_call_that_hangs_ends_at_the_models_deadline(stage_with: StartProxyEnvironment) -> None:
    """`--model-deadline` ends a call that is never answered, and the pair is asked again."""
    stage = stage_with("--model-deadline", "300ms", *UNLIMITED_RATE_FLAGS)
    release = threading.Event()

    def hang_once(call: ReceivedCall) -> Answers:
        if call.number == 0:
            release.wait(20)
        return answer_all(call)

    stage.model.behaviour = hang_once
    assert stage.caller.infer([("hangs", "t")]).levels == [scripted_level("hangs", "t")]
    release.set()


def test_a_callers_deadline_ends_its_wait(stage: ProxyEnvironment) -> None:
    """DEADLINE_EXCEEDED when it passes; what the model answers later is cached."""
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


def test_max_wait_bounds_a_caller_without_a_deadline(stage_with: StartProxyEnvironment) -> None:
    """Who gives no deadline waits `--max-wait`, then gets DEADLINE_EXCEEDED."""
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


def test_a_message_over_the_limit_is_refused_by_grpc(stage_with: StartProxyEnvironment) -> None:
    """RESOURCE_EXHAUSTED without the trailer, since asking again would not help."""
    stage = stage_with("--max-request-bytes", "10KiB", *UNLIMITED_RATE_FLAGS)
    reply = stage.caller.infer(make_pairs("x" * 100, 200))
    assert (reply.code, reply.pushback_ms) == (StatusCode.RESOURCE_EXHAUSTED, None)
    assert stage.caller.infer(make_pairs("fits", 10)).code is StatusCode.OK


def _queued(proxy: ServiceProcess) -> float:
    return read_metrics(proxy.http_url)[("cache_proxy_queue_pairs", "interactive")]


def _reply_is_cached(stage: ProxyEnvironment, pair: tuple[str, str]) -> bool:
    reply = stage.caller.infer([pair], timeout_seconds=1)
    return reply.code is grpc.StatusCode.OK and reply.hits == 1


def test_a_flood_of_empty_pairs_is_refused_before_it_is_made(stage_with: StartProxyEnvironment) -> None:
    """Thirty-two million empty pairs in 64 MiB cost neither gigabytes nor other callers their answers."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    assert stage.caller.infer(make_pairs("known", 1)).code is StatusCode.OK
    with grpc.insecure_channel(stage.proxy.target) as channel:
        raw: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/SeniorityModel/InferSeniority"
        )
        flood = raw.future(b"\x0a\x00" * (2**25 - 16), timeout=60)
        with pytest.raises(grpc.RpcError) as refused:
            flood.result()
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT
    status = Path(f"/proc/{stage.proxy.process.pid}/status").read_text()
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak_kib < 600 * 1024
    assert stage.caller.infer(make_pairs("known", 1)).code is StatusCode.OK


def test_a_pair_that_breaks_the_model_fails_alone(stage_with: StartProxyEnvironment) -> None:
    """The model answers UNKNOWN for any batch with one pair: that one is found, the others are answered."""

    def breaks(call: ReceivedCall) -> Answers:
        if any(company == "breaker" for company, _ in call.pairs):
            raise AbortCallError(StatusCode.UNKNOWN, "exception in the model")
        return answer_all(call)

    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    stage.model.behaviour = breaks
    pairs = [*make_pairs("innocent", 30), ("breaker", "t")]
    reply = stage.caller.infer(pairs)
    assert reply.code is StatusCode.UNAVAILABLE
    assert reply.pushback_ms
    calls = len(stage.model.calls)
    assert stage.caller.infer(pairs[:-1]).code is StatusCode.OK
    assert len(stage.model.calls) == calls
    assert stage.caller.infer([("breaker", "t")]).code is StatusCode.UNAVAILABLE
    assert len(stage.model.calls) == calls, "remembered for a while"
