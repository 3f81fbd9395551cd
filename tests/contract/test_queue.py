"""Contract of the queue, for the local one and the shared one.

More than 250 lines: one contract, which both implementations must pass.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

import pytest
from grpc import StatusCode

from services.cache_proxy.domain import PACE, Outcome, Pair
from services.cache_proxy.errors import (
    InvalidModelResponseError,
    ModelUnavailableError,
    PairError,
    PairRejectedError,
    QueueFullError,
)
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from tests.support.queue_subjects import QueueFactory, QueueSubject
from tests.support.replicas import numbered_pair, numbered_pairs, pair_numbers, queue_limits, request_context

BAD = PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad", ".title", "too odd")
DOWN = ModelUnavailableError("down", retry_after_seconds=1.0)


async def test_pair_is_queued_joined_claimed_and_completed(opened: QueueFactory) -> None:
    """The first request queues the pair, the next one joins it, and one batch contains it."""
    async with opened() as subject:
        assert (await subject.enqueue([numbered_pair(1), numbered_pair(2)])).queued == {
            numbered_pair(1).digest,
            numbered_pair(2).digest,
        }
        joined = await subject.enqueue([numbered_pair(2), numbered_pair(3)])
        assert joined.queued == {numbered_pair(3).digest}
        assert not joined.outcomes
        claim = await subject.claim_batch()
        assert sorted(pair_numbers(claim)) == [1, 2, 3]
        assert (await subject.enqueue([numbered_pair(1)])).queued == frozenset()
        assert not isinstance(await subject.queue.claim(), Claim)
        await subject.complete(claim, 5)
        assert subject.outcomes() == {1: 5, 2: 5, 3: 5}
        assert await subject.is_empty()


async def test_batch_has_texts_of_first_request(opened: QueueFactory) -> None:
    """Texts of any script, and empty ones, are not changed."""
    texts = ["", "Zürich Größe", "株式会社", "a\x00b", "x" * 4096, "🙂" * 300]
    wanted = [Pair(number.to_bytes(16, "big"), text, text[::-1]) for number, text in enumerate(texts)]
    async with opened(queue_limits(batch_pairs=10)) as subject:
        await subject.enqueue(wanted)
        await subject.enqueue([Pair(item.digest, "other", "spelling") for item in wanted])
        assert sorted(map(repr, (await subject.claim_batch()).pairs)) == sorted(map(repr, wanted))


async def test_cancelled_pair_is_not_sent(opened: QueueFactory) -> None:
    """A cancelled pair in a call still ends, and its outcome is remembered."""
    async with opened(queue_limits(batch_pairs=2)) as subject:
        await subject.enqueue(numbered_pairs([1, 2]))
        claim = await subject.claim_batch()
        await subject.enqueue(numbered_pairs([3, 4]))
        await subject.queue.cancel([numbered_pair(1).digest, numbered_pair(3).digest])
        assert pair_numbers(await subject.claim_batch()) == [4]
        await subject.complete(claim)
        assert (await subject.enqueue([numbered_pair(1)])).outcomes == {numbered_pair(1).digest: 3}


async def test_answer_is_remembered_and_first_invalid_response_is_not(opened: QueueFactory) -> None:
    """A level and a rejection are returned at once. A pair with an invalid response is inferred once more."""
    async with opened(queue_limits(batch_pairs=3)) as subject:
        await subject.enqueue(numbered_pairs([1, 2, 3]))
        claim = await subject.claim_batch()
        await subject.queue.complete(
            claim, {numbered_pair(1).digest: 7, numbered_pair(2).digest: InvalidModelResponseError("none")}
        )
        await subject.queue.reject(claim, BAD, {})
        again = await subject.enqueue(numbered_pairs([1, 2, 3]))
        assert again.outcomes[numbered_pair(1).digest] == 7
        assert again.queued == {numbered_pair(2).digest}
        claim = await subject.claim_batch()
        await subject.queue.complete(
            claim, {numbered_pair(2).digest: InvalidModelResponseError("none again")}
        )
        nonsense = (await subject.enqueue(numbered_pairs([2]))).outcomes[numbered_pair(2).digest]
        assert isinstance(nonsense, InvalidModelResponseError)
        assert nonsense.message == "none again"
        refused = again.outcomes[numbered_pair(3).digest]
        assert isinstance(refused, PairRejectedError)
        assert (refused.code, refused.message, refused.field, refused.reason) == (
            BAD.code,
            BAD.message,
            BAD.field,
            BAD.reason,
        )


async def test_batch_ends_in_parts(opened: QueueFactory) -> None:
    """The pairs that the cache had end first. The rest can be released and claimed again."""
    async with opened() as subject:
        await subject.enqueue(numbered_pairs([1, 2, 3, 4]))
        claim = await subject.claim_batch()
        await subject.queue.complete(claim, {numbered_pair(1).digest: 1, numbered_pair(2).digest: 2})
        assert set(subject.outcomes()) == {1, 2}
        await subject.queue.release(claim)
        claim = await subject.claim_batch()
        assert sorted(pair_numbers(claim)) == [3, 4]
        await subject.complete(claim)
        assert subject.outcomes() == {1: 1, 2: 2, 3: 3, 4: 3}
        assert await subject.is_empty()


async def test_answer_of_released_batch_counts(opened: QueueFactory) -> None:
    """Nothing of the batch is sent again."""
    async with opened() as subject:
        await subject.enqueue(numbered_pairs([1, 2]))
        claim = await subject.claim_batch()
        await subject.queue.release(claim)
        await subject.complete(claim, 2)
        assert subject.outcomes() == {1: 2, 2: 2}
        assert await subject.is_empty()


async def test_no_claim_before_pushback_ends(opened: QueueFactory) -> None:
    """A failed call brought a pushback."""
    async with opened() as subject:
        await subject.enqueue([numbered_pair(1)])
        await subject.queue.fail(await subject.claim_batch(), DOWN, retry_after_seconds=20)
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        assert 19 < decision.wait_seconds < 21


async def test_released_batch_is_claimed_first(opened: QueueFactory) -> None:
    """It precedes all pairs that came since, even after its lane was empty."""
    async with opened(queue_limits(batch_pairs=2)) as subject:
        # The virtual time of the lane advances far.
        for first in range(0, 40, 2):
            await subject.enqueue(numbered_pairs([first, first + 1]))
        for _ in range(19):
            await subject.complete(await subject.claim_batch())
        last = await subject.claim_batch()
        assert pair_numbers(last) == [38, 39]
        await subject.enqueue(numbered_pairs([100, 101, 102, 103]), request_context("other"))
        await subject.queue.release(last)
        assert sorted(pair_numbers(await subject.claim_batch())) == [38, 39]


async def test_batch_has_interactive_first_a_tenth_bulk_and_refreshes_last(opened: QueueFactory) -> None:
    """Refreshes get what the other priorities leave."""
    async with opened(queue_limits(batch_pairs=20)) as subject:
        await subject.enqueue(numbered_pairs(range(200, 240)), request_context(priority="refresh"))
        await subject.enqueue(numbered_pairs(range(100, 120)), request_context(priority="bulk"))
        await subject.enqueue(numbered_pairs(range(40)), request_context(priority="interactive"))
        seen = []
        for _ in range(4):
            claim = await subject.claim_batch()
            lanes = [number // 100 for number in pair_numbers(claim)]
            seen.append((lanes.count(0), lanes.count(1), lanes.count(2)))
            await subject.complete(claim)
        assert seen == [(18, 2, 0), (18, 2, 0), (4, 16, 0), (0, 0, 20)]


async def test_bulk_reserve_holds_in_bytes(opened: QueueFactory) -> None:
    """Long interactive texts fill every batch."""
    async with opened(queue_limits(batch_pairs=100, batch_bytes=20_000)) as subject:
        await subject.enqueue(
            numbered_pairs(range(100, 150), text="b" * 400), request_context(priority="bulk")
        )
        await subject.enqueue(numbered_pairs(range(100), text="i" * 400))
        claim = await subject.claim_batch()
        lanes = [number // 100 for number in pair_numbers(claim)]
        assert lanes.count(1) >= 3
        assert lanes.count(0) >= 35
        assert sum(item.size_bytes for item in claim.pairs) <= 20_000


async def test_pair_above_batch_bytes_is_sent_alone(opened: QueueFactory) -> None:
    """The other pairs are sent without it."""
    async with opened(queue_limits(batch_pairs=10, batch_bytes=500)) as subject:
        await subject.enqueue([numbered_pair(1, text="x" * 4000), *numbered_pairs([2, 3])])
        sizes = []
        for _ in range(2):
            claim = await subject.claim_batch()
            sizes.append(sorted(pair_numbers(claim)))
            await subject.complete(claim)
        assert sorted(sizes) == [[1], [2, 3]]


async def test_better_priority_of_two_requests_counts(opened: QueueFactory) -> None:
    """A bulk pair that an interactive request joins keeps the better priority."""
    async with opened(queue_limits(batch_pairs=2)) as subject:
        await subject.enqueue(numbered_pairs(range(6)), request_context("b", "bulk"))
        await subject.enqueue([numbered_pair(5)], request_context("i", "interactive"))
        await subject.enqueue([numbered_pair(5)], request_context("b", "bulk"))
        assert 5 in pair_numbers(await subject.claim_batch())


async def test_small_caller_does_not_wait_for_large_one(opened: QueueFactory) -> None:
    """Two pairs of one caller, enqueued after 5000 of another, are in the next batch."""
    async with opened(queue_limits(batch_pairs=100)) as subject:
        await subject.enqueue(numbered_pairs(range(5000)), request_context("big"))
        await subject.complete(await subject.claim_batch())
        await subject.enqueue(numbered_pairs([9001, 9002]), request_context("small"))
        assert {9001, 9002} <= set(pair_numbers(await subject.claim_batch()))


async def test_callers_share_the_batches_evenly(opened: QueueFactory) -> None:
    """Three callers with a backlog each get a third, in whatever order they came."""
    async with opened(queue_limits(batch_pairs=30)) as subject:
        for caller in range(3):
            await subject.enqueue(
                numbered_pairs(range(caller * 1000, caller * 1000 + 200)), request_context(f"caller {caller}")
            )
        for _ in range(5):
            claim = await subject.claim_batch()
            shares = [number // 1000 for number in pair_numbers(claim)]
            assert [shares.count(caller) for caller in range(3)] == [10, 10, 10]
            await subject.complete(claim)


async def test_request_above_max_pairs_is_rejected_as_a_whole(opened: QueueFactory) -> None:
    """Also over several script calls. Pairs that a request joins do not count."""
    async with opened(queue_limits(batch_pairs=1000, max_pairs=1600)) as subject:
        with pytest.raises(QueueFullError) as full:
            await subject.enqueue(numbered_pairs(range(1601)))
        assert full.value.retry_after_seconds >= 1
        assert await subject.is_empty()
        await subject.enqueue(numbered_pairs(range(1600)))
        with pytest.raises(QueueFullError):
            await subject.enqueue([numbered_pair(5000)])
        assert (await subject.enqueue(numbered_pairs(range(1600)))).queued == frozenset()
        await subject.complete(await subject.claim_batch())
        await subject.enqueue([numbered_pair(5000)])


async def test_request_above_max_bytes_is_rejected_as_a_whole(opened: QueueFactory) -> None:
    """All of its bytes count, not those of its first chunk."""
    async with opened(
        queue_limits(batch_pairs=1000, max_bytes=1000 * numbered_pair(10**6).size_bytes)
    ) as subject:
        with pytest.raises(QueueFullError):
            await subject.enqueue(numbered_pairs(range(10**6, 10**6 + 1001)))
        assert await subject.is_empty()
        await subject.enqueue(numbered_pairs(range(10**6, 10**6 + 1000)))


async def test_request_whose_first_pairs_join_is_bounded(opened: QueueFactory) -> None:
    """A rejected request leaves nothing behind."""
    async with opened(queue_limits(batch_pairs=1000, max_pairs=1000)) as subject:
        await subject.enqueue(numbered_pairs(range(600)))
        with pytest.raises(QueueFullError):
            await subject.enqueue(numbered_pairs(range(2000)))
        claim = await subject.claim_batch()
        assert sorted(pair_numbers(claim)) == list(range(600))
        await subject.complete(claim)
        assert await subject.is_empty()


SLOW = queue_limits(batch_pairs=10, calls_per_second=1, pairs_per_second=10)


async def test_request_with_too_long_wait_is_rejected_at_once(opened: QueueFactory) -> None:
    """With 30 batches of the caller ahead, one a second, a deadline of 5 s is too short.

    One of 60 s is not. That holds for pairs that wait already, too, and a rejected request changes
    nothing.
    """
    async with opened(SLOW) as subject:
        await subject.enqueue(numbered_pairs(range(300)), request_context("a", timeout=60))
        with pytest.raises(QueueFullError, match="would wait"):
            await subject.enqueue([numbered_pair(1000)], request_context("a", timeout=5))
        with pytest.raises(QueueFullError, match="would wait"):
            await subject.enqueue([numbered_pair(1), numbered_pair(250)], request_context("b", timeout=5))
        await subject.enqueue([numbered_pair(1000)], request_context("a", timeout=60))
        assert (
            await subject.enqueue([numbered_pair(5)], request_context("b", timeout=5))
        ).queued == frozenset()


async def test_small_caller_is_admitted_by_its_own_wait(opened: QueueFactory) -> None:
    """Behind 30 batches of another caller its pairs go in the next call, so 5 s are enough.

    They are not for 80 pairs, which get half of each call.
    """
    async with opened(SLOW) as subject:
        await subject.enqueue(numbered_pairs(range(300)), request_context("a", timeout=60))
        await subject.enqueue(numbered_pairs([1000, 1001]), request_context("b", timeout=5))
        with pytest.raises(QueueFullError, match="would wait"):
            await subject.enqueue(numbered_pairs(range(2000, 2080)), request_context("c", timeout=5))


async def test_bulk_is_admitted_by_its_reserve(opened: QueueFactory) -> None:
    """With interactive pairs for a minute, a bulk pair goes in the next call, and five need five calls."""
    async with opened(SLOW) as subject:
        await subject.enqueue(numbered_pairs(range(600)), request_context("a", timeout=120))
        await subject.enqueue([numbered_pair(1000)], request_context("b", "bulk", timeout=3))
        with pytest.raises(QueueFullError, match="would wait"):
            await subject.enqueue(numbered_pairs(range(1001, 1006)), request_context("b", "bulk", timeout=3))
        await subject.enqueue(numbered_pairs(range(1001, 1006)), request_context("b", "bulk", timeout=9))


async def test_request_with_better_priority_is_admitted_by_it(opened: QueueFactory) -> None:
    """A bulk pair far behind is not too late for an interactive request, which moves it forward."""
    async with opened(SLOW) as subject:
        await subject.enqueue(numbered_pairs(range(600)), request_context("a", "bulk", timeout=120))
        with pytest.raises(QueueFullError, match="would wait"):
            await subject.enqueue([numbered_pair(599)], request_context("b", "bulk", timeout=5))
        await subject.enqueue([numbered_pair(599)], request_context("b", timeout=5))
        claim = await subject.claim_batch()
        assert 599 in pair_numbers(claim)


async def test_linger_delays_partial_batch_only(opened: QueueFactory) -> None:
    """A full batch is claimed at once."""
    async with opened(queue_limits(batch_pairs=3, linger_seconds=30)) as subject:
        await subject.enqueue([numbered_pair(1)])
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        assert 29 < decision.wait_seconds <= 30
        await subject.enqueue(numbered_pairs([2, 3]))
        assert len((await subject.claim_batch()).pairs) == 3


async def _find_bad(
    subject: QueueSubject, bad: set[int], end: Callable[[Claim], Awaitable[None]] | None = None
) -> list[list[int]]:
    """Reject, or end with `end`, all batches with a pair of `bad`; return the batches."""
    calls: list[list[int]] = []
    for _ in range(500):
        decision = await subject.queue.claim()
        if isinstance(decision, ClaimDeferred):
            if math.isinf(decision.wait_seconds):
                return calls
            await asyncio.sleep(decision.wait_seconds)
            continue
        calls.append(pair_numbers(decision))
        if not bad.intersection(pair_numbers(decision)):
            await subject.complete(decision)
        elif end:
            await end(decision)
        else:
            await subject.queue.reject(decision, BAD, {})
    raise AssertionError("no end")


async def _ends(subject: QueueSubject, numbers: list[int]) -> dict[int, Outcome]:
    return {
        int.from_bytes(digest, "big"): outcome
        for digest, outcome in (await subject.enqueue(numbered_pairs(numbers))).outcomes.items()
    }


async def test_unnamed_invalid_pairs_are_found_by_bisection(opened: QueueFactory) -> None:
    """Two of 64 pairs are rejected and the others answered, with about two calls for each bisection step."""
    async with opened(queue_limits(batch_pairs=64)) as subject:
        await subject.enqueue(numbered_pairs(range(64)))
        calls = await _find_bad(subject, {7, 50})
        ends = await _ends(subject, list(range(64)))
        assert {number for number, end in ends.items() if isinstance(end, PairRejectedError)} == {7, 50}
        assert len(ends) == 64
        assert len(calls) <= 30


async def test_suspects_are_split_by_caller_first(opened: QueueFactory) -> None:
    """A caller whose pairs are valid is answered by the first probe, not after the last."""
    async with opened(queue_limits(batch_pairs=40)) as subject:
        await subject.enqueue(numbered_pairs(range(100, 120)), request_context("bad"))
        await subject.enqueue(numbered_pairs(range(20)), request_context("good"))
        calls = await _find_bad(subject, {105})
        assert all(len({number // 100 for number in call}) == 1 for call in calls[1:])


async def test_named_pair_ends_and_others_are_sent_again(opened: QueueFactory) -> None:
    """It ends with the error that names it."""
    async with opened(queue_limits(batch_pairs=10)) as subject:
        await subject.enqueue(numbered_pairs(range(10)))
        claim = await subject.claim_batch()
        named = PairRejectedError(StatusCode.OUT_OF_RANGE, "title 4", ".title", "too long")
        await subject.queue.reject(claim, BAD, {numbered_pair(4).digest: named})
        claim = await subject.claim_batch()
        assert sorted(pair_numbers(claim)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        await subject.complete(claim)
        found = (await _ends(subject, [4]))[4]
        assert isinstance(found, PairRejectedError)
        assert (found.code, found.message) == (named.code, named.message)


async def test_probes_are_every_fourth_call_while_others_wait(opened: QueueFactory) -> None:
    """Invalid pairs of one caller leave three of four calls to others."""
    async with opened(queue_limits(batch_pairs=10)) as subject:
        await subject.enqueue(numbered_pairs(range(10)), request_context("bad"))
        first = await subject.claim_batch()
        await subject.queue.reject(first, BAD, {})
        await subject.enqueue(numbered_pairs(range(100, 400)), request_context("good"))
        kinds = []
        for _ in range(16):
            claim = await subject.claim_batch()
            kinds.append(max(pair_numbers(claim)) < 100)
            if 3 in pair_numbers(claim):
                await subject.queue.reject(claim, BAD, {})
            else:
                await subject.complete(claim)
        assert all(sum(kinds[start : start + 4]) <= 1 for start in range(13))
        assert sum(kinds) >= 3


async def test_pair_rejected_32_times_ends(opened: QueueFactory) -> None:
    """With a model that rejects everything, each pair ends with an error."""
    async with opened(queue_limits(batch_pairs=8)) as subject:
        await subject.enqueue(numbered_pairs(range(8)))
        await _find_bad(subject, set(range(8)))
        ends = await _ends(subject, list(range(8)))
        assert len(ends) == 8
        assert all(isinstance(end, PairError) for end in ends.values())


@pytest.mark.slow
async def test_late_batch_postpones_next_slot(opened: QueueFactory) -> None:
    """By its lateness; the last report counts. If the next slot is taken already, it is not moved."""
    async with opened(queue_limits(batch_pairs=1, calls_per_second=0.5)) as subject:
        await subject.enqueue(numbered_pairs(range(3)))
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        await asyncio.sleep(decision.wait_seconds)
        begun_at = time.monotonic()
        first = await subject.claim_batch()
        # The time of the slot is known only so exactly, for a queue with another clock.
        unsure = time.monotonic() - begun_at
        for late_seconds in (0.3, 0.5, 0.5):
            assert await subject.queue.postpone_slot(first, seconds=late_seconds)
            requested_at = time.monotonic()
            decision = await subject.queue.claim()
            assert isinstance(decision, ClaimDeferred)
            earliest, latest = (
                at + decision.wait_seconds - first.slot_at for at in (requested_at, time.monotonic())
            )
            assert earliest - unsure - 0.1 <= 2 / PACE + late_seconds <= latest + unsure + 0.1
        await asyncio.sleep(decision.wait_seconds)
        await subject.claim_batch()
        assert not await subject.queue.postpone_slot(first, seconds=0.5)


async def test_released_late_batch_leaves_slot_free(opened: QueueFactory) -> None:
    """The postponement is undone with the claim."""
    async with opened(queue_limits(batch_pairs=1, calls_per_second=0.5)) as subject:
        await subject.enqueue(numbered_pairs([1]))
        decision = await subject.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        await asyncio.sleep(decision.wait_seconds)
        claim = await subject.claim_batch()
        assert await subject.queue.postpone_slot(claim, seconds=0.5)
        await subject.queue.release(claim)
        decision = await subject.queue.claim()
        assert isinstance(decision, Claim) or decision.wait_seconds < 0.1
        assert not await subject.queue.postpone_slot(claim, seconds=0.1)


async def test_pair_that_causes_model_fault_is_found(opened: QueueFactory) -> None:
    """A batch that failed twice is bisected.

    Only the pair ends without a level, and its error is remembered for a while.
    """
    async with opened(queue_limits(batch_pairs=8)) as subject:
        await subject.enqueue(numbered_pairs(range(8)))

        async def breaks(claim: Claim) -> None:
            await subject.queue.fail(claim, DOWN, retry_after_seconds=0, model_fault=True)

        calls = await _find_bad(subject, {5}, breaks)
        ends = await _ends(subject, list(range(8)))
        assert {number: type(end) for number, end in ends.items()} == {
            number: ModelUnavailableError if number == 5 else int for number in range(8)
        }
        assert calls.count(calls[0]) == 2
        assert len(calls) <= 2 + 2 * 3


@pytest.mark.parametrize("patience", [(0.3, 60.0), (60.0, 0.3)], ids=["joined later", "joined before"])
async def test_pair_waits_until_latest_deadline_of_its_requests(
    opened: QueueFactory, patience: tuple[float, float]
) -> None:
    """A request that joins can only extend it. That holds after a repeated enqueue, too."""
    async with opened() as subject:
        for seconds in patience:
            await subject.enqueue([numbered_pair(1)], request_context(timeout=seconds))
        await subject.poll()
        await asyncio.sleep(0.35)
        assert pair_numbers(await subject.claim_batch()) == [1]
