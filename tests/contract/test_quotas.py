"""Quotas of callers, for every queue: ceilings in any window, rejections, and fairness to other callers."""

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest
from grpc import StatusCode

from services.cache_proxy.errors import ModelUnavailableError, PairRejectedError, QuotaExceededError
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.cache_proxy.queue.quotas import DEFAULT_ACCOUNT, Quota, Quotas
from tests.support.queue_subjects import QueueFactory, QueueSubject
from tests.support.replicas import numbered_pair, numbered_pairs, pair_numbers, queue_limits, request_context

BAD = PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad", ".title", "too odd")
DOWN = ModelUnavailableError("down", retry_after_seconds=1.0)
# With short slots of the rate limit.
BURST_SECONDS = 1.0
HOUR_SECONDS = 3600.0


def make_quotas(*callers: Quota, others: Quota | None = None) -> Quotas:
    """Return quotas as a quota file would define them."""
    return Quotas({quota.account: quota for quota in callers}, others)


def rate_quota(account: str, pairs_per_second: float) -> Quota:
    """Return a quota in pairs per second."""
    return Quota(account, pairs_per_second=pairs_per_second)


async def run_batches(subject: QueueSubject, *, seconds: float) -> list[tuple[float, list[int]]]:
    """Dispatch and answer batches for some time. Return when each was claimed, and its pairs."""
    claimed = []
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        decision = await subject.queue.claim()
        if isinstance(decision, ClaimDeferred):
            await asyncio.sleep(min(decision.wait_seconds, end - now))
            continue
        claimed.append((decision.slot_at, pair_numbers(decision)))
        await subject.complete(decision)
    return claimed


def worst_excess(
    claimed: Sequence[tuple[float, list[int]]], counts: Callable[[int], bool], pairs_per_second: float
) -> float:
    """Return by how many pairs any window exceeds the rate and a burst of one second."""
    events = [(at, sum(map(counts, numbers))) for at, numbers in claimed]
    worst = 0.0
    for first, (begins, _) in enumerate(events):
        total = 0
        for at, count in events[first:]:
            total += count
            worst = max(worst, total - pairs_per_second * (at - begins + BURST_SECONDS))
    return worst


async def test_quota_is_ceiling_and_other_callers_fill_batches(opened: QueueFactory) -> None:
    """No window holds more than the quota allows, nearly all of it is used, and every batch is full."""
    bounds = queue_limits(batch_pairs=20, calls_per_second=50)
    async with opened(bounds, make_quotas(rate_quota("held", 100))) as subject:
        await subject.enqueue(numbered_pairs(range(500)), request_context("held"))
        await subject.enqueue(numbered_pairs(range(1000, 3000)), request_context("free"))
        claimed = await run_batches(subject, seconds=0.35)
    held_count = sum(number < 1000 for _, numbers in claimed for number in numbers)
    assert worst_excess(claimed, lambda number: number < 1000, 100) <= 1
    assert held_count >= 0.8 * 100 * (claimed[-1][0] - claimed[0][0]) - 2
    assert all(len(numbers) == 20 for _, numbers in claimed)


async def test_quota_is_ceiling_without_other_callers(opened: QueueFactory) -> None:
    """A used-up quota gets no idle slots, and the claim returns when to retry."""
    async with opened(queue_limits(batch_pairs=20), make_quotas(rate_quota("held", 100))) as subject:
        await subject.enqueue(numbered_pairs(range(500)), request_context("held"))
        claimed = await run_batches(subject, seconds=0.3)
        assert worst_excess(claimed, lambda _: True, 100) <= 1
        assert sum(len(numbers) for _, numbers in claimed) >= 15
        decision = await subject.queue.claim()
        while isinstance(decision, Claim):
            decision = await subject.queue.claim()
        assert 0 < decision.wait_seconds < 0.2


async def test_interactive_pairs_of_quota_go_first(opened: QueueFactory) -> None:
    """A caller's bulk pairs do not use up the quota that its interactive pairs need."""
    async with opened(
        queue_limits(batch_pairs=20), make_quotas(rate_quota("held", 10)), begun=True
    ) as subject:
        await subject.enqueue(numbered_pairs(range(100, 200)), request_context("held", "bulk"))
        await subject.enqueue(numbered_pairs(range(8)), request_context("held"))
        subject.age_quotas(HOUR_SECONDS)
        assert sorted(pair_numbers(await subject.claim_batch())) == [*range(8), 100]


async def test_request_beyond_queued_pairs_quota_is_rejected(opened: QueueFactory) -> None:
    """The error names the quota, which counts both priorities.

    Joined pairs need no quota, and other callers are not affected.
    """
    async with opened(queue_limits(batch_pairs=4), make_quotas(Quota("small", queued_pairs=6))) as subject:
        with pytest.raises(QuotaExceededError, match=r"queued_pairs of caller 'small': 0 .* 7 .* 6") as over:
            await subject.enqueue(numbered_pairs(range(7)), request_context("small"))
        assert (over.value.account, over.value.quota) == ("small", "queued_pairs")
        assert over.value.retry_after_seconds >= 1
        assert await subject.is_empty()
        await subject.enqueue(numbered_pairs(range(4)), request_context("small"))
        await subject.enqueue(numbered_pairs(range(4, 6)), request_context("small", "bulk"))
        with pytest.raises(QuotaExceededError):
            await subject.enqueue([numbered_pair(6)], request_context("small", "bulk"))
        await subject.enqueue(numbered_pairs(range(100, 120)), request_context("other"))
        await subject.enqueue(numbered_pairs(range(100, 120)), request_context("small"))
        claim = await subject.claim_batch()
        while not any(number < 6 for number in pair_numbers(claim)):
            claim = await subject.claim_batch()
        await subject.enqueue([numbered_pair(6)], request_context("small"))


async def test_large_request_counts_as_a_whole(opened: QueueFactory) -> None:
    """Also when it takes several script calls, one after the other or concurrently."""
    async with opened(quotas=make_quotas(Quota("c", queued_pairs=1600))) as subject:
        with pytest.raises(QuotaExceededError):
            await subject.enqueue(numbered_pairs(range(1601)))
        assert await subject.is_empty()
        requests = [subject.enqueue(numbered_pairs(range(start, start + 900))) for start in (0, 2000)]
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(result).__name__ for result in results].count("QuotaExceededError") == 1
        await subject.enqueue(numbered_pairs(range(5000, 5700)))


async def test_deadline_before_quota_allows_pair_is_rejected(opened: QueueFactory) -> None:
    """The error names the quota. Requests with a later deadline, or of other callers, are admitted."""
    async with opened(quotas=make_quotas(rate_quota("held", 10))) as subject:
        await subject.enqueue(numbered_pairs(range(100)), request_context("held", timeout=60))
        with pytest.raises(
            QuotaExceededError, match="quota pairs_per_second of caller 'held': at 10 pairs"
        ) as over:
            await subject.enqueue([numbered_pair(1000)], request_context("held", timeout=5))
        assert over.value.quota == "pairs_per_second"
        assert 3 < over.value.retry_after_seconds < 7
        with pytest.raises(QuotaExceededError):
            await subject.enqueue(
                numbered_pairs(range(2000, 2100)), request_context("held", "bulk", timeout=12)
            )
        await subject.enqueue([numbered_pair(1000)], request_context("held", timeout=20))
        await subject.enqueue(numbered_pairs(range(3000, 3005)), request_context("other", timeout=1))


async def test_backlog_of_quota_does_not_delay_admission_of_others(opened: QueueFactory) -> None:
    """Only pairs that may be sent earlier count as ahead, not the whole backlog."""
    bounds = queue_limits(batch_pairs=10, calls_per_second=1, pairs_per_second=10)
    async with opened(bounds, make_quotas(rate_quota("flood", 1))) as subject:
        await subject.enqueue(numbered_pairs(range(500)), request_context("flood", timeout=1000))
        await subject.enqueue(numbered_pairs(range(1000, 1020)), request_context("other", timeout=5))
        await subject.enqueue(numbered_pairs(range(2000, 2004)), request_context("bulk", "bulk", timeout=6))


async def test_joined_pair_is_sent_with_first_available_quota(opened: QueueFactory) -> None:
    """Neither the first request nor one that joins waits for the quota of the other."""
    async with opened(
        queue_limits(batch_pairs=10), make_quotas(rate_quota("slow", 0.01), rate_quota("quick", 1e6))
    ) as subject:
        await subject.enqueue(numbered_pairs(range(100)), request_context("slow", timeout=30_000))
        await subject.enqueue(numbered_pairs(range(90, 95)), request_context("quick", timeout=5))
        await subject.enqueue(numbered_pairs(range(80, 85)), request_context("free", "bulk", timeout=5))
        await subject.enqueue(numbered_pairs(range(200, 205)), request_context("quick"))
        await subject.enqueue(numbered_pairs(range(200, 205)), request_context("slow", timeout=5))
        assert sorted(await subject.drain()) == [*range(80, 85), *range(90, 95), *range(200, 205)]
        with pytest.raises(QuotaExceededError):
            await subject.enqueue([numbered_pair(300)], request_context("slow", timeout=5))


async def test_joined_pair_is_charged_to_position_it_was_sent_from(opened: QueueFactory) -> None:
    """Joining a pair of another caller does not bypass a quota."""
    async with opened(
        queue_limits(batch_pairs=10),
        make_quotas(rate_quota("slow", 0.01), rate_quota("other", 4)),
        begun=True,
    ) as subject:
        await subject.enqueue(numbered_pairs(range(100)), request_context("slow", timeout=30_000))
        await subject.enqueue(numbered_pairs(range(100)), request_context("other", timeout=300))
        subject.age_quotas(1.2)
        claimed = await run_batches(subject, seconds=0.3)
        assert worst_excess(claimed, lambda _: True, 4) <= 1
        assert 4 <= sum(len(numbers) for _, numbers in claimed) <= 5


async def test_joining_with_quota_does_not_delay_pair(opened: QueueFactory) -> None:
    """The pair keeps the position without a quota."""
    async with opened(queue_limits(batch_pairs=10), make_quotas(rate_quota("slow", 0.5))) as subject:
        await subject.enqueue(numbered_pairs(range(50)), request_context("slow", timeout=300))
        await subject.enqueue(numbered_pairs(range(100, 105)), request_context("free", "bulk"))
        await subject.enqueue(numbered_pairs(range(100, 105)), request_context("slow", timeout=300))
        assert sorted(pair_numbers(await subject.claim_batch())) == list(range(100, 105))


async def test_unlisted_callers_share_one_quota(opened: QueueFactory) -> None:
    """Together they have what `others` allows, both as a rate and as queued pairs."""
    others = Quota(DEFAULT_ACCOUNT, pairs_per_second=200, queued_pairs=300)
    async with opened(queue_limits(batch_pairs=10), make_quotas(others=others)) as subject:
        names = (
            subject.enqueue(numbered_pairs([name, 500 + name]), request_context(f"name {name}"))
            for name in range(150)
        )
        await asyncio.gather(*names)
        with pytest.raises(QuotaExceededError, match="of all callers without one of their own"):
            await subject.enqueue([numbered_pair(10_000)], request_context("one more"))
        claimed = await run_batches(subject, seconds=0.2)
    assert worst_excess(claimed, lambda _: True, 200) <= 1
    seen = [number % 500 for _, numbers in claimed for number in numbers]
    assert len(seen) >= 20
    # The first hundred names have turns of their own, all others share one.
    firsts = seen[:90]
    assert len(set(firsts)) == len(firsts), "a second pair of one caller before the first of another"


async def test_unlisted_callers_share_one_turn(opened: QueueFactory) -> None:
    """A listed caller has half of every batch, however many unlisted names there are."""
    async with opened(
        queue_limits(batch_pairs=20), make_quotas(Quota("named"), others=Quota(DEFAULT_ACCOUNT))
    ) as subject:
        names = (
            subject.enqueue(numbered_pairs([name, 500 + name]), request_context(f"name {name}"))
            for name in range(150)
        )
        await asyncio.gather(*names)
        await subject.enqueue(numbered_pairs(range(1000, 1100)), request_context("named"))
        for _ in range(5):
            claim = await subject.claim_batch()
            assert 9 <= sum(number >= 1000 for number in pair_numbers(claim)) <= 11
            assert len(claim.pairs) == 20
            await subject.complete(claim)


async def test_accounts_take_turns_in_single_pair_batches(opened: QueueFactory) -> None:
    """No account waits for more than one pair of each other account."""
    names = ("a", "b", "c")
    async with opened(queue_limits(batch_pairs=1), make_quotas(*map(Quota, names))) as subject:
        for at, name in enumerate((*names, "free")):
            await subject.enqueue(numbered_pairs(range(10 * at, 10 * at + 4)), request_context(name))
        seen = [pair_numbers(await subject.claim_batch())[0] // 10 for _ in range(16)]
        assert all(sorted(seen[start : start + 4]) == [0, 1, 2, 3] for start in (0, 4, 8, 12))


async def test_released_batch_consumes_no_quota(opened: QueueFactory) -> None:
    """It may be sent again at once, with what was earned since."""
    async with opened(
        queue_limits(batch_pairs=100), make_quotas(rate_quota("held", 10)), begun=True
    ) as subject:
        await subject.enqueue(numbered_pairs(range(100)), request_context("held"))
        subject.age_quotas(HOUR_SECONDS)
        claim = await subject.claim_batch()
        assert len(claim.pairs) >= 9
        await subject.queue.release(claim)
        again = await subject.claim_batch()
        assert pair_numbers(again)[: len(claim.pairs)] == pair_numbers(claim)


@pytest.mark.parametrize("outcome", ["fail", "reject"])
async def test_retried_pair_is_not_charged_again(opened: QueueFactory, outcome: str) -> None:
    """A failing model, or a bad pair of another caller, consumes no quota."""
    async with opened(
        queue_limits(batch_pairs=8), make_quotas(rate_quota("held", 0.01)), begun=True
    ) as subject:
        await subject.enqueue([numbered_pair(1)], request_context("held", timeout=900))
        subject.age_quotas(HOUR_SECONDS)
        claim = await subject.claim_batch()
        if outcome == "fail":
            await subject.queue.fail(claim, DOWN, retry_after_seconds=0)
        else:
            await subject.queue.reject(claim, BAD, {numbered_pair(2).digest: BAD})
        claim = await subject.claim_batch()
        assert pair_numbers(claim) == [1]
        await subject.complete(claim)
        await subject.enqueue(numbered_pairs([3, 4]), request_context("held", timeout=900))
        assert await subject.drain() == []
        subject.age_quotas(104)
        assert await subject.drain() == [3]


async def test_changed_quotas_apply_to_waiting_pairs(opened: QueueFactory) -> None:
    """Whether a quota is raised, removed or added."""
    async with opened(queue_limits(batch_pairs=50), make_quotas(rate_quota("c", 0.01))) as subject:
        await subject.enqueue(numbered_pairs(range(50)), request_context("c", timeout=9000))
        assert not isinstance(await subject.queue.claim(), Claim)
        subject.quotas.current = make_quotas()
        await subject.poll()
        claim = await subject.claim_batch()
        assert sorted(pair_numbers(claim)) == list(range(50))
        await subject.complete(claim)
        await subject.enqueue(numbered_pairs(range(100, 150)), request_context("c"))
        subject.quotas.current = make_quotas(rate_quota("c", 0.01))
        await subject.poll()
        assert not isinstance(await subject.queue.claim(), Claim)
        subject.quotas.current = make_quotas(rate_quota("c", 1e6))
        await subject.poll()
        assert sorted(pair_numbers(await subject.claim_batch())) == list(range(100, 150))


async def test_refreshed_pairs_have_no_quota(opened: QueueFactory) -> None:
    """They fill otherwise empty places of a batch."""
    async with opened(
        queue_limits(batch_pairs=10), make_quotas(others=rate_quota(DEFAULT_ACCOUNT, 0.01))
    ) as subject:
        await subject.enqueue(numbered_pairs(range(5)), request_context("", "refresh"))
        assert sorted(pair_numbers(await subject.claim_batch())) == list(range(5))
