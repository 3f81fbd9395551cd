"""Every queue while calls to the model fail: retry within a window, probe, reject, resume."""

import asyncio
import time

import pytest
from grpc import StatusCode

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairRejectedError
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.cache_proxy.queue.outage import MAX_MODEL_FAULTS, PROBE_PAIRS
from services.cache_proxy.queue.redis_queue import RedisQueue
from tests.support.queue_subjects import QueueFactory, QueueSubject
from tests.support.replicas import numbered_pair, numbered_pairs, pair_numbers, queue_limits, request_context

DOWN = ModelUnavailableError("UNAVAILABLE: out to lunch", retry_after_seconds=1.0)
WINDOW_SECONDS = 0.4
SHORT = queue_limits(batch_pairs=50, retry_window_seconds=WINDOW_SECONDS)


async def _fail(subject: QueueSubject, claim: Claim, *, model_fault: bool = False) -> None:
    """Fail a call without a pushback, and skip the extra backoff of this replica."""
    await asyncio.sleep(claim.send_at - time.monotonic())
    await subject.queue.fail(claim, DOWN, model_fault=model_fault)
    if isinstance(subject.queue, RedisQueue):
        subject.queue.claims.deferral.not_before = 0.0
    await subject.receive_messages()


def _outcomes(subject: QueueSubject) -> dict[int, Outcome]:
    """Return the outcomes by the number of the pair. The replica's own messages repeat them."""
    return {int.from_bytes(digest, "big"): outcome for digest, outcome in subject.resolved}


async def _enqueue_until_accepted(subject: QueueSubject, number: int) -> None:
    while await _try_enqueue(subject, [numbered_pair(number)]):  # noqa: ASYNC110 - a backoff has no event
        await asyncio.sleep(0.05)


async def _try_enqueue(
    subject: QueueSubject, pairs: list[Pair], timeout_seconds: float = 60
) -> ModelUnavailableError | None:
    try:
        await subject.enqueue(pairs, request_context(timeout=timeout_seconds))
    except ModelUnavailableError as error:
        return error
    return None


async def _fail_until_down(subject: QueueSubject) -> int:
    """Fail every call until the window is over. Return the number of calls."""
    calls = 0
    while not subject.resolved:
        await _fail(subject, await subject.claim_batch())
        calls += 1
    return calls


async def test_pairs_are_retried_for_window_and_then_all_fail(opened: QueueFactory) -> None:
    """Not by a number of attempts: nothing ends before the window is over.

    Then all waiting pairs end at once with the error, also those that were never sent.
    """
    async with opened(SHORT) as subject:
        await subject.enqueue(numbered_pairs(range(60)))
        started_at = time.monotonic()
        assert await _fail_until_down(subject) >= 3
        assert time.monotonic() - started_at >= WINDOW_SECONDS
        outcomes = _outcomes(subject)
        assert set(outcomes) == set(range(60))
        assert all(
            isinstance(end, ModelUnavailableError) and "out to lunch" in end.message
            for end in outcomes.values()
        )
        assert await subject.is_empty()


async def test_last_retry_is_at_end_of_window(opened: QueueFactory) -> None:
    """A backoff beyond the window is cut, since no pair would profit from that retry."""
    async with opened(queue_limits(retry_window_seconds=0.9)) as subject:
        await subject.enqueue([numbered_pair(1)])
        started_at = time.monotonic()
        await _fail_until_down(subject)
        # Without the cut, the backoffs of the retries would add up to half a minute.
        assert time.monotonic() - started_at < 5


async def test_failing_model_is_probed_by_one_small_call_at_a_time(opened: QueueFactory) -> None:
    """The other pairs stay queued. Once the probe is answered, the next batch is full."""
    async with opened(queue_limits(batch_pairs=50)) as subject:
        await subject.enqueue(numbered_pairs(range(200)))
        await _fail(subject, await subject.claim_batch())
        for _ in range(2):
            probe = await subject.claim_batch()
            assert len(probe.pairs) <= PROBE_PAIRS
            assert isinstance(await subject.queue.claim(), ClaimDeferred), "one at a time"
            await _fail(subject, probe)
        await subject.complete(await subject.claim_batch())
        assert len((await subject.claim_batch()).pairs) == 50
        assert len((await subject.claim_batch()).pairs) == 50


async def test_backoff_doubles_until_model_answers(opened: QueueFactory) -> None:
    """The next outage begins with a short backoff."""
    async with opened() as subject:
        await subject.enqueue(numbered_pairs(range(8)))

        async def fail_once() -> float:
            await _fail(subject, await subject.claim_batch())
            decision = await subject.queue.claim()
            assert isinstance(decision, ClaimDeferred)
            return decision.wait_seconds

        waits = [await fail_once() for _ in range(3)]
        assert 0.1 < waits[0] < 0.35 < waits[1] < 0.65 < waits[2] < 1.25
        await subject.complete(await subject.claim_batch())
        assert await fail_once() < 0.35


async def test_completion_from_store_does_not_end_outage(opened: QueueFactory) -> None:
    """Pairs of a probe that another replica had answered show nothing about the model."""
    async with opened(queue_limits(batch_pairs=2)) as subject:
        await subject.enqueue(numbered_pairs(range(3)))
        await _fail(subject, await subject.claim_batch())
        probe = await subject.claim_batch()
        await subject.queue.complete(probe, {probe.pairs[0].digest: 3}, inferred=False)
        await _fail(subject, probe)
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        assert decision.wait_seconds > 0.35


async def test_new_pairs_are_rejected_while_model_is_down(opened: QueueFactory) -> None:
    """With the error and the time of the next probe.

    The request at that time becomes the probe. Once it is answered, all requests are accepted.
    """
    async with opened(SHORT) as subject:
        await subject.enqueue([numbered_pair(1)])
        await _fail_until_down(subject)
        rejection = await _try_enqueue(subject, [numbered_pair(2), numbered_pair(3)])
        assert rejection
        assert "out to lunch" in rejection.message
        assert rejection.retry_after_seconds >= 1
        await _enqueue_until_accepted(subject, 4)
        assert await _try_enqueue(subject, [numbered_pair(5)]), "one probe is enough"
        assert 4 not in _outcomes(subject), "a rejected request does not end the wait of others"
        await subject.complete(await subject.claim_batch(), 6)
        assert _outcomes(subject)[4] == 6
        assert (await subject.enqueue([numbered_pair(5)])).queued


async def test_failed_probe_after_window_fails_its_pairs(opened: QueueFactory) -> None:
    """They do not wait for another window."""
    async with opened(SHORT) as subject:
        await subject.enqueue([numbered_pair(1)])
        await _fail_until_down(subject)
        await _enqueue_until_accepted(subject, 2)
        await _fail(subject, await subject.claim_batch())
        assert isinstance(_outcomes(subject)[2], ModelUnavailableError)


async def test_deadline_before_next_retry_is_rejected(opened: QueueFactory) -> None:
    """A new request is rejected, and waiting ones get the time of the retry."""
    async with opened() as subject:
        await subject.enqueue([numbered_pair(1)])
        before = time.monotonic()
        await subject.queue.fail(await subject.claim_batch(), DOWN, retry_after_seconds=20)
        await subject.receive_messages()
        assert any(abs(moment - before - 20) < 5 for moment in subject.backoff_deadlines)
        late = await _try_enqueue(subject, [numbered_pair(2)], timeout_seconds=5)
        assert late
        assert 15 < late.retry_after_seconds <= 20
        assert await _try_enqueue(subject, [numbered_pair(1)], timeout_seconds=5)
        assert not subject.resolved, "a rejected request does not end the wait of others"
        assert (await subject.enqueue([numbered_pair(2)])).queued


async def test_unsent_call_returns_its_slot(opened: QueueFactory) -> None:
    """Without a connection the model saw nothing, so the next batch gets the slot."""
    async with opened(queue_limits(batch_pairs=1, calls_per_second=1)) as subject:
        await subject.enqueue(numbered_pairs([1, 2]))
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        await asyncio.sleep(decision.wait_seconds)
        await subject.queue.fail(await subject.claim_batch(), DOWN, retry_after_seconds=0, unsent=True)
        if isinstance(subject.queue, RedisQueue):
            subject.queue.claims.deferral.not_before = 0.0
        decision = await subject.queue.claim()
        assert isinstance(decision, Claim) or decision.wait_seconds < 0.5


async def test_faults_of_lone_pair_fail_it_only_after_window(opened: QueueFactory) -> None:
    """Nothing else passed meanwhile, so the model may be broken for all pairs."""
    async with opened(queue_limits(retry_window_seconds=60)) as subject:
        await subject.enqueue([numbered_pair(1)])
        for _ in range(4):
            await _fail(subject, await subject.claim_batch(), model_fault=True)
        await subject.complete(await subject.claim_batch(), 5)
        assert _outcomes(subject) == {1: 5}


@pytest.mark.slow
async def test_model_that_fails_on_everything_is_down(opened: QueueFactory) -> None:
    """After the window, and as many faults as the search for one pair may take."""
    async with opened(SHORT) as subject:
        await subject.enqueue(numbered_pairs(range(4)))
        calls = 0
        while not subject.resolved:
            await _fail(subject, await subject.claim_batch(), model_fault=True)
            calls += 1
        assert calls >= MAX_MODEL_FAULTS
        assert all(isinstance(end, ModelUnavailableError) for end in _outcomes(subject).values())


@pytest.mark.slow
async def test_one_of_two_pairs_that_breaks_model_is_found(opened: QueueFactory) -> None:
    """Its lone probe proves nothing while everything fails. It does once the other pair has passed."""
    for bad in (1, 2):
        async with opened(queue_limits(batch_pairs=8)) as subject:
            await subject.enqueue(numbered_pairs([1, 2]))
            while len(_outcomes(subject)) < 2:
                claim = await subject.claim_batch()
                if bad in pair_numbers(claim):
                    await _fail(subject, claim, model_fault=True)
                else:
                    await subject.complete(claim)
                await subject.receive_messages()
            outcomes = _outcomes(subject)
            assert {number: type(end) for number, end in outcomes.items()} == {
                bad: ModelUnavailableError,
                3 - bad: int,
            }


@pytest.mark.slow
async def test_pair_that_crashes_model_is_found(opened: QueueFactory) -> None:
    """The model is UNAVAILABLE whenever it gets that pair, and answers in between.

    The failed batches have the pair in common.
    """
    async with opened(queue_limits(batch_pairs=40)) as subject:
        await subject.enqueue(numbered_pairs(range(40)))
        calls = 0
        while 33 not in _outcomes(subject) and calls < 100:
            claim = await subject.claim_batch()
            calls += 1
            if 33 in pair_numbers(claim):
                await _fail(subject, claim)
            else:
                await subject.complete(claim)
            await subject.receive_messages()
            # Other requests come meanwhile.
            await subject.enqueue([numbered_pair(1000 + calls)])
        outcomes = _outcomes(subject)
        assert isinstance(outcomes[33], ModelUnavailableError)
        assert all(isinstance(end, int) for number, end in outcomes.items() if number != 33)


async def test_rejection_ends_outage(opened: QueueFactory) -> None:
    """The model is there, so calls go on at the full rate."""
    async with opened() as subject:
        await subject.enqueue(numbered_pairs([1, 2]))
        await _fail(subject, await subject.claim_batch())
        await subject.queue.reject(
            await subject.claim_batch(), PairRejectedError(StatusCode.INVALID_ARGUMENT, "no"), {}
        )
        assert isinstance(await subject.queue.claim(), Claim)


async def test_old_outage_does_not_shorten_next_window(opened: QueueFactory) -> None:
    """Without requests meanwhile, the first failure afterwards begins a new window."""
    async with opened(SHORT) as subject:
        await subject.enqueue([numbered_pair(1)])
        await _fail(subject, await subject.claim_batch())
        await subject.queue.cancel([numbered_pair(1).digest])
        await _age(subject, 60)
        await subject.enqueue([numbered_pair(2)])
        await _fail(subject, await subject.claim_batch())
        assert not subject.resolved


async def _age(subject: QueueSubject, seconds: float) -> None:
    outage = getattr(subject.queue, "_outage", None)
    if outage is not None:
        for name in ("_started_at", "failed_at", "not_before"):
            setattr(outage, name, getattr(outage, name) - seconds)
        return
    scripts = subject.queue._scripts  # type: ignore[attr-defined]
    _, base, _, model, _ = scripts._keys
    for key, names in (
        (model, ("failed_at", "backoff_until")),
        (f"{base}meta", ("failing_since", "failing_at")),
    ):
        for name in names:
            await scripts._node.command("EVAL", _AGE, 1, key, name, round(seconds * 1000))


_AGE = "redis.call('HSET', KEYS[1], ARGV[1], redis.call('HGET', KEYS[1], ARGV[1]) - ARGV[2])"
