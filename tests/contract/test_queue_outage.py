"""What both queues do while calls to the model fail: retry for a window, probe, refuse, resume."""

import asyncio
import time

import pytest
from grpc import StatusCode

from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairRejectedError
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.cache_proxy.queue.outage import MAX_MODEL_FAULTS, PROBE_PAIRS
from tests.support.queue_subjects import QueueFactory, QueueSubject
from tests.support.replicas import numbered_pair, numbered_pairs, pair_numbers, queue_limits, request_context

DOWN = ModelUnavailableError("UNAVAILABLE: out to lunch", retry_after_seconds=1.0)
WINDOW_SECONDS = 0.4
SHORT = queue_limits(batch_pairs=50, retry_window_seconds=WINDOW_SECONDS)


async def _fail(subject: QueueSubject, claim: Claim, *, suspicious: bool = False) -> None:
    """Fail a call for which the model gave no pushback; this replica waits no longer than the fleet."""
    await asyncio.sleep(claim.send_at - time.monotonic())
    await subject.queue.fail(claim, DOWN, model_fault=suspicious)
    if hasattr(subject.queue, "_not_before"):
        subject.queue._not_before = 0.0
    await subject.receive_messages()


def _ended(subject: QueueSubject) -> dict[int, Outcome]:
    """How pairs ended, by number; the replica's own messages say the same again."""
    return {int.from_bytes(digest, "big"): outcome for digest, outcome in subject.resolved}


async def _ask_until_queued(subject: QueueSubject, number: int) -> None:
    while await _is_refused(subject, [numbered_pair(number)]):  # noqa: ASYNC110 - a backoff has no event
        await asyncio.sleep(0.05)


async def _is_refused(
    subject: QueueSubject, wanted: list[Pair], patience: float = 60
) -> ModelUnavailableError | None:
    try:
        await subject.enqueue(wanted, request_context(timeout=patience))
    except ModelUnavailableError as error:
        return error
    return None


async def _go_down(subject: QueueSubject) -> int:
    """Fail every call until the window is over; how many there were."""
    calls = 0
    while not subject.resolved:
        await _fail(subject, await subject.claim_batch())
        calls += 1
    return calls


async def test_pairs_are_retried_for_the_window_and_then_all_end(opened: QueueFactory) -> None:
    """Not by a count of tries: nothing ends before the window is over, and then all that waits ends at once,
    with the reason, also what was never sent.
    """  # noqa: D205 - one thought
    async with opened(SHORT) as subject:
        await subject.enqueue(numbered_pairs(range(60)))
        begun_at = time.monotonic()
        assert await _go_down(subject) >= 3
        assert time.monotonic() - begun_at >= WINDOW_SECONDS
        ended = _ended(subject)
        assert set(ended) == set(range(60))
        assert all(
            isinstance(end, ModelUnavailableError) and "out to lunch" in end.message for end in ended.values()
        )
        assert await subject.is_empty()


async def test_the_last_try_is_when_the_window_ends(opened: QueueFactory) -> None:
    """A backoff that would go beyond the window is cut: nobody waits for a try that cannot help."""
    async with opened(queue_limits(retry_window_seconds=0.9)) as subject:
        await subject.enqueue([numbered_pair(1)])
        begun_at = time.monotonic()
        await _go_down(subject)
        assert (
            time.monotonic() - begun_at < 5
        )  # backoffs alone: 0.25, 0.5 and 1 s, and half a minute before the 9th


async def test_while_calls_fail_one_small_call_at_a_time_probes(opened: QueueFactory) -> None:
    """The other pairs stay queued; when the probe is answered, the next batch is full at once."""
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


async def test_backoffs_grow_and_an_answer_ends_them(opened: QueueFactory) -> None:
    """Each failed call doubles the wait; the next outage begins with a short one again."""
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


async def test_an_answer_of_the_store_ends_no_outage(opened: QueueFactory) -> None:
    """Pairs of a probe that another replica had answered before say nothing of the model."""
    async with opened(queue_limits(batch_pairs=2)) as subject:
        await subject.enqueue(numbered_pairs(range(3)))
        await _fail(subject, await subject.claim_batch())
        probe = await subject.claim_batch()
        await subject.queue.complete(probe, {probe.pairs[0].digest: 3}, inferred=False)
        await _fail(subject, probe)
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        assert decision.wait_seconds > 0.35


async def test_while_the_model_is_down_new_pairs_are_refused_at_once(opened: QueueFactory) -> None:
    """With the reason and the time of the next probe. Whoever asks then is the probe, and the next again not;
    when it is answered, all is as before.
    """  # noqa: D205 - one thought
    async with opened(SHORT) as subject:
        await subject.enqueue([numbered_pair(1)])
        await _go_down(subject)
        refused = await _is_refused(subject, [numbered_pair(2), numbered_pair(3)])
        assert refused
        assert "out to lunch" in refused.message
        assert refused.retry_after_seconds >= 1
        await _ask_until_queued(subject, 4)
        assert await _is_refused(subject, [numbered_pair(5)]), "one probe is enough"
        assert 4 not in _ended(subject), "whoever is refused ends nobody else's wait"
        await subject.complete(await subject.claim_batch(), 6)
        assert _ended(subject)[4] == 6
        assert (await subject.enqueue([numbered_pair(5)])).queued


async def test_a_probe_that_fails_after_the_window_ends_its_pairs_at_once(opened: QueueFactory) -> None:
    """Whoever asked it need not wait for another window."""
    async with opened(SHORT) as subject:
        await subject.enqueue([numbered_pair(1)])
        await _go_down(subject)
        await _ask_until_queued(subject, 2)
        await _fail(subject, await subject.claim_batch())
        assert isinstance(_ended(subject)[2], ModelUnavailableError)


async def test_nobody_waits_for_a_try_after_the_deadline(opened: QueueFactory) -> None:
    """A caller whose deadline comes before the next try is refused, those who wait are told its moment."""
    async with opened() as subject:
        await subject.enqueue([numbered_pair(1)])
        before = time.monotonic()
        await subject.queue.fail(await subject.claim_batch(), DOWN, retry_after_seconds=20)
        await subject.receive_messages()
        assert any(abs(moment - before - 20) < 5 for moment in subject.backoff_deadlines)
        late = await _is_refused(subject, [numbered_pair(2)], patience=5)
        assert late
        assert 15 < late.retry_after_seconds <= 20
        assert await _is_refused(subject, [numbered_pair(1)], patience=5)
        assert not subject.resolved, "whoever is refused ends nobody else's wait"
        assert (await subject.enqueue([numbered_pair(2)])).queued


async def test_a_call_that_was_never_sent_frees_its_slot(opened: QueueFactory) -> None:
    """There was no connection, so the model saw nothing: the slot is the next batch's."""
    async with opened(queue_limits(batch_pairs=1, calls_per_second=1)) as subject:
        await subject.enqueue(numbered_pairs([1, 2]))
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        await asyncio.sleep(decision.wait_seconds)
        await subject.queue.fail(await subject.claim_batch(), DOWN, retry_after_seconds=0, unsent=True)
        if hasattr(subject.queue, "_not_before"):
            subject.queue._not_before = 0.0
        decision = await subject.queue.claim()
        assert isinstance(decision, Claim) or decision.wait_seconds < 0.5


async def test_breakdowns_of_a_lone_pair_end_it_only_with_the_window(opened: QueueFactory) -> None:
    """Nothing passed since, so the model may be broken for all: no count of tries ends it."""
    async with opened(queue_limits(retry_window_seconds=60)) as subject:
        await subject.enqueue([numbered_pair(1)])
        for _ in range(4):
            await _fail(subject, await subject.claim_batch(), suspicious=True)
        await subject.complete(await subject.claim_batch(), 5)
        assert _ended(subject) == {1: 5}


@pytest.mark.slow
async def test_a_model_that_breaks_down_over_everything_is_down(opened: QueueFactory) -> None:
    """After the window, and as many breakdowns as the search for one pair may take."""
    async with opened(SHORT) as subject:
        await subject.enqueue(numbered_pairs(range(4)))
        calls = 0
        while not subject.resolved:
            await _fail(subject, await subject.claim_batch(), suspicious=True)
            calls += 1
        assert calls >= MAX_MODEL_FAULTS
        assert all(isinstance(end, ModelUnavailableError) for end in _ended(subject).values())


@pytest.mark.slow
async def test_of_two_pairs_the_one_that_breaks_the_model_is_found(opened: QueueFactory) -> None:
    """Its lone probe says nothing while everything failed; the other's passes, and then it does."""
    for bad in (1, 2):
        async with opened(queue_limits(batch_pairs=8)) as subject:
            await subject.enqueue(numbered_pairs([1, 2]))
            while len(_ended(subject)) < 2:
                claim = await subject.claim_batch()
                if bad in pair_numbers(claim):
                    await _fail(subject, claim, suspicious=True)
                else:
                    await subject.complete(claim)
                await subject.receive_messages()
            ended = _ended(subject)
            assert {number: type(end) for number, end in ended.items()} == {
                bad: ModelUnavailableError,
                3 - bad: int,
            }


@pytest.mark.slow
async def test_a_pair_that_kills_the_model_is_found_too(opened: QueueFactory) -> None:
    """The model is gone for a moment whenever it gets that pair (`UNAVAILABLE`), and answers in between: the
    batches that fail have it in common.
    """  # noqa: D205 - one thought
    async with opened(queue_limits(batch_pairs=40)) as subject:
        await subject.enqueue(numbered_pairs(range(40)))
        calls = 0
        while 33 not in _ended(subject) and calls < 100:
            claim = await subject.claim_batch()
            calls += 1
            if 33 in pair_numbers(claim):
                await _fail(subject, claim)
            else:
                await subject.complete(claim)
            await subject.receive_messages()
            await subject.enqueue([numbered_pair(1000 + calls)])  # others ask meanwhile
        ended = _ended(subject)
        assert isinstance(ended[33], ModelUnavailableError)
        assert all(isinstance(end, int) for number, end in ended.items() if number != 33)


async def test_a_refusal_is_an_answer(opened: QueueFactory) -> None:
    """The model is there: calls go on at the full rate."""
    async with opened() as subject:
        await subject.enqueue(numbered_pairs([1, 2]))
        await _fail(subject, await subject.claim_batch())
        await subject.queue.reject(
            await subject.claim_batch(), PairRejectedError(StatusCode.INVALID_ARGUMENT, "no"), {}
        )
        assert isinstance(await subject.queue.claim(), Claim)


async def test_an_outage_long_ago_does_not_shorten_the_next(opened: QueueFactory) -> None:
    """Nobody asked meanwhile: the first failure after it begins a window of its own."""
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
