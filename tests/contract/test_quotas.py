"""Quotas of callers, on both queues: ceilings in every window, refusals, and what they never do to others."""

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
BURST_SECONDS = 1.0  # where the limit's slots are short
HOUR_SECONDS = 3600.0


def quotas(*callers: Quota, others: Quota | None = None) -> Quotas:
    """As a file with these would have it."""
    return Quotas({quota.account: quota for quota in callers}, others)


def rate(account: str, pairs_per_second: float) -> Quota:
    """Pairs a second for a caller."""
    return Quota(account, pairs_per_second=pairs_per_second)


async def batches(subject: QueueSubject, *, seconds: float) -> list[tuple[float, list[int]]]:
    """Be a dispatcher and a model for so long: when each batch was taken, and its pairs."""
    taken = []
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        decision = await subject.queue.claim()
        if isinstance(decision, ClaimDeferred):
            await asyncio.sleep(min(decision.wait_seconds, end - now))
            continue
        taken.append((decision.slot_at, pair_numbers(decision)))
        await subject.complete(decision)
    return taken


def most_over(
    taken: Sequence[tuple[float, list[int]]], counts: Callable[[int], bool], pairs_per_second: float
) -> float:
    """By how many pairs any window holds more than the rate and a burst of one second allow."""
    events = [(at, sum(map(counts, numbers))) for at, numbers in taken]
    worst = 0.0
    for first, (begins, _) in enumerate(events):
        total = 0
        for at, count in events[first:]:
            total += count
            worst = max(worst, total - pairs_per_second * (at - begins + BURST_SECONDS))
    return worst


async def test_a_quota_is_a_ceiling_and_others_fill_the_batches(opened: QueueFactory) -> None:
    """Whatever its caller asks: in no window more than it allows, nearly that, and every batch is full."""
    bounds = queue_limits(batch_pairs=20, calls_per_second=50)
    async with opened(bounds, quotas(rate("held", 100))) as subject:
        await subject.enqueue(numbered_pairs(range(500)), request_context("held"))
        await subject.enqueue(numbered_pairs(range(1000, 3000)), request_context("free"))
        taken = await batches(subject, seconds=0.35)
    of_held = sum(number < 1000 for _, numbers in taken for number in numbers)
    assert most_over(taken, lambda number: number < 1000, 100) <= 1
    assert of_held >= 0.8 * 100 * (taken[-1][0] - taken[0][0]) - 2
    assert all(len(numbers) == 20 for _, numbers in taken)


async def test_a_quota_is_a_ceiling_where_nobody_else_asks(opened: QueueFactory) -> None:
    """Idle slots are not given to a caller whose quota is spent; a claim says when to come back."""
    async with opened(queue_limits(batch_pairs=20), quotas(rate("held", 100))) as subject:
        await subject.enqueue(numbered_pairs(range(500)), request_context("held"))
        taken = await batches(subject, seconds=0.3)
        assert most_over(taken, lambda _: True, 100) <= 1
        assert sum(len(numbers) for _, numbers in taken) >= 15
        decision = await subject.queue.claim()
        while isinstance(decision, Claim):
            decision = await subject.queue.claim()
        assert 0 < decision.wait_seconds < 0.2


async def test_interactive_pairs_of_a_quota_go_first(opened: QueueFactory) -> None:
    """A caller's own bulk does not use up what its interactive pairs need, tenth or not."""
    async with opened(queue_limits(batch_pairs=20), quotas(rate("held", 10)), begun=True) as subject:
        await subject.enqueue(numbered_pairs(range(100, 200)), request_context("held", "bulk"))
        await subject.enqueue(numbered_pairs(range(8)), request_context("held"))
        subject.age_quotas(HOUR_SECONDS)
        assert sorted(pair_numbers(await subject.claim_batch())) == [*range(8), 100]


async def test_more_than_may_wait_is_refused_whole(opened: QueueFactory) -> None:
    """Of both priorities, in words that name the quota; what joins needs no room, and others have theirs."""
    async with opened(queue_limits(batch_pairs=4), quotas(Quota("small", queued_pairs=6))) as subject:
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


async def test_a_large_request_is_measured_whole(opened: QueueFactory) -> None:
    """Over several script calls' worth too, one after the other and at once."""
    async with opened(quotas=quotas(Quota("c", queued_pairs=1600))) as subject:
        with pytest.raises(QuotaExceededError):
            await subject.enqueue(numbered_pairs(range(1601)))
        assert await subject.is_empty()
        asks = [subject.enqueue(numbered_pairs(range(start, start + 900))) for start in (0, 2000)]
        ends = await asyncio.gather(*asks, return_exceptions=True)
        assert [type(end).__name__ for end in ends].count("QuotaExceededError") == 1
        await subject.enqueue(numbered_pairs(range(5000, 5700)))


async def test_a_deadline_before_the_quotas_turn_is_refused_at_once(opened: QueueFactory) -> None:
    """In words that name the quota; whoever waits longer, or is another, is let in."""
    async with opened(quotas=quotas(rate("held", 10))) as subject:
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


async def test_a_flood_under_a_quota_makes_nobody_elses_turn_look_late(opened: QueueFactory) -> None:
    """Who asks behind it is admitted by what may go before it, not by all that waits."""
    bounds = queue_limits(batch_pairs=10, calls_per_second=1, pairs_per_second=10)
    async with opened(bounds, quotas(rate("flood", 1))) as subject:
        await subject.enqueue(numbered_pairs(range(500)), request_context("flood", timeout=1000))
        await subject.enqueue(numbered_pairs(range(1000, 1020)), request_context("other", timeout=5))
        await subject.enqueue(numbered_pairs(range(2000, 2004)), request_context("bulk", "bulk", timeout=6))


async def test_a_pair_goes_out_by_whichever_quota_has_room(opened: QueueFactory) -> None:
    """Who joins a pair that a quota holds back need not wait for that, nor does who came first."""
    async with opened(
        queue_limits(batch_pairs=10), quotas(rate("slow", 0.01), rate("quick", 1e6))
    ) as subject:
        await subject.enqueue(numbered_pairs(range(100)), request_context("slow", timeout=30_000))
        await subject.enqueue(numbered_pairs(range(90, 95)), request_context("quick", timeout=5))
        await subject.enqueue(numbered_pairs(range(80, 85)), request_context("free", "bulk", timeout=5))
        await subject.enqueue(numbered_pairs(range(200, 205)), request_context("quick"))
        await subject.enqueue(numbered_pairs(range(200, 205)), request_context("slow", timeout=5))
        assert sorted(await subject.drain()) == [*range(80, 85), *range(90, 95), *range(200, 205)]
        with pytest.raises(QuotaExceededError):
            await subject.enqueue([numbered_pair(300)], request_context("slow", timeout=5))


async def test_a_joined_pair_is_charged_to_whose_turn_it_took(opened: QueueFactory) -> None:
    """Asking for what another waits for is no way round a quota."""
    async with opened(
        queue_limits(batch_pairs=10), quotas(rate("slow", 0.01), rate("other", 4)), begun=True
    ) as subject:
        await subject.enqueue(numbered_pairs(range(100)), request_context("slow", timeout=30_000))
        await subject.enqueue(numbered_pairs(range(100)), request_context("other", timeout=300))
        subject.age_quotas(1.2)
        taken = await batches(subject, seconds=0.3)
        assert most_over(taken, lambda _: True, 4) <= 1
        assert 4 <= sum(len(numbers) for _, numbers in taken) <= 5


async def test_who_joins_does_not_lose_the_place_that_the_pair_had(opened: QueueFactory) -> None:
    """A caller with a quota that asks for another's pair makes it go no later."""
    async with opened(queue_limits(batch_pairs=10), quotas(rate("slow", 0.5))) as subject:
        await subject.enqueue(numbered_pairs(range(50)), request_context("slow", timeout=300))
        await subject.enqueue(numbered_pairs(range(100, 105)), request_context("free", "bulk"))
        await subject.enqueue(numbered_pairs(range(100, 105)), request_context("slow", timeout=300))
        assert sorted(pair_numbers(await subject.claim_batch())) == list(range(100, 105))


async def test_made_up_names_share_one_quota(opened: QueueFactory) -> None:
    """Many names have together what `others` allows, in the queue as well."""
    others = Quota(DEFAULT_ACCOUNT, pairs_per_second=200, queued_pairs=300)
    async with opened(queue_limits(batch_pairs=10), quotas(others=others)) as subject:
        names = (
            subject.enqueue(numbered_pairs([name, 500 + name]), request_context(f"name {name}"))
            for name in range(150)
        )
        await asyncio.gather(*names)
        with pytest.raises(QuotaExceededError, match="of all callers without one of their own"):
            await subject.enqueue([numbered_pair(10_000)], request_context("one more"))
        taken = await batches(subject, seconds=0.2)
    assert most_over(taken, lambda _: True, 200) <= 1
    seen = [number % 500 for _, numbers in taken for number in numbers]
    assert len(seen) >= 20
    firsts = seen[:90]  # of a hundred names with turns of their own, and one for all others
    assert len(set(firsts)) == len(firsts), "a second pair of somebody's before another's first"


async def test_made_up_names_get_no_more_than_a_turn(opened: QueueFactory) -> None:
    """A caller that the file names has half of every batch, however many names the other half has."""
    async with opened(
        queue_limits(batch_pairs=20), quotas(Quota("named"), others=Quota(DEFAULT_ACCOUNT))
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


async def test_accounts_take_turns_in_the_smallest_batches(opened: QueueFactory) -> None:
    """Where a call holds one pair, nobody waits for more than one of each other's."""
    names = ("a", "b", "c")
    async with opened(queue_limits(batch_pairs=1), quotas(*map(Quota, names))) as subject:
        for at, name in enumerate((*names, "free")):
            await subject.enqueue(numbered_pairs(range(10 * at, 10 * at + 4)), request_context(name))
        seen = [pair_numbers(await subject.claim_batch())[0] // 10 for _ in range(16)]
        assert all(sorted(seen[start : start + 4]) == [0, 1, 2, 3] for start in (0, 4, 8, 12))


async def test_a_batch_put_back_costs_no_quota(opened: QueueFactory) -> None:
    """It may go out again at once, and with what is saved up since: nothing is charged twice."""
    async with opened(queue_limits(batch_pairs=100), quotas(rate("held", 10)), begun=True) as subject:
        await subject.enqueue(numbered_pairs(range(100)), request_context("held"))
        subject.age_quotas(HOUR_SECONDS)
        claim = await subject.claim_batch()
        assert len(claim.pairs) >= 9
        await subject.queue.release(claim)
        again = await subject.claim_batch()
        assert pair_numbers(again)[: len(claim.pairs)] == pair_numbers(claim)


@pytest.mark.parametrize("how", ["fail", "refuse"])
async def test_what_is_sent_again_is_not_charged_again(opened: QueueFactory, how: str) -> None:
    """A model that fails, or another's bad pair, takes nothing of a caller's quota."""
    async with opened(queue_limits(batch_pairs=8), quotas(rate("held", 0.01)), begun=True) as subject:
        await subject.enqueue([numbered_pair(1)], request_context("held", timeout=900))
        subject.age_quotas(HOUR_SECONDS)
        claim = await subject.claim_batch()
        if how == "fail":
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


async def test_other_quotas_hold_for_those_who_wait_too(opened: QueueFactory) -> None:
    """A quota that is raised, taken away or set anew does so for what is in the queue already."""
    async with opened(queue_limits(batch_pairs=50), quotas(rate("c", 0.01))) as subject:
        await subject.enqueue(numbered_pairs(range(50)), request_context("c", timeout=9000))
        assert not isinstance(await subject.queue.claim(), Claim)
        subject.quotas.current = quotas()
        await subject.poll()
        claim = await subject.claim_batch()
        assert sorted(pair_numbers(claim)) == list(range(50))
        await subject.complete(claim)
        await subject.enqueue(numbered_pairs(range(100, 150)), request_context("c"))
        subject.quotas.current = quotas(rate("c", 0.01))
        await subject.poll()
        assert not isinstance(await subject.queue.claim(), Claim)
        subject.quotas.current = quotas(rate("c", 1e6))
        await subject.poll()
        assert sorted(pair_numbers(await subject.claim_batch())) == list(range(100, 150))


async def test_what_is_refreshed_is_under_no_quota(opened: QueueFactory) -> None:
    """It fills spare places, whoever's stale answers they were."""
    async with opened(queue_limits(batch_pairs=10), quotas(others=rate(DEFAULT_ACCOUNT, 0.01))) as subject:
        await subject.enqueue(numbered_pairs(range(5)), request_context("", "refresh"))
        assert sorted(pair_numbers(await subject.claim_batch())) == list(range(5))
