"""Quotas of callers, on both queues: ceilings in every window, refusals, and what they never do to others."""

import asyncio
import time
from collections.abc import Callable, Sequence

import pytest
from grpc import StatusCode

from services.cache_proxy.errors import OverQuota, Refused, Unavailable
from services.cache_proxy.queue.interface import Claim, NotYet
from services.cache_proxy.queue.quotas import OTHERS, Quota, Quotas
from tests.support.queue_subjects import Open, Subject
from tests.support.replicas import asker, limits, numbers_of, pair, pairs

BAD = Refused(StatusCode.INVALID_ARGUMENT, "bad", ".title", "too odd")
DOWN = Unavailable("down", retry_after_seconds=1.0)
BURST_SECONDS = 1.0  # where the limit's slots are short
HOUR_SECONDS = 3600.0


def quotas(*callers: Quota, others: Quota | None = None) -> Quotas:
    """As a file with these would have it."""
    return Quotas({quota.account: quota for quota in callers}, others)


def rate(account: str, pairs_per_second: float) -> Quota:
    """Pairs a second for a caller."""
    return Quota(account, pairs_per_second=pairs_per_second)


async def batches(subject: Subject, *, seconds: float) -> list[tuple[float, list[int]]]:
    """Be a dispatcher and a model for so long: when each batch was taken, and its pairs."""
    taken = []
    end = time.monotonic() + seconds
    while (now := time.monotonic()) < end:
        decision = await subject.queue.claim()
        if isinstance(decision, NotYet):
            await asyncio.sleep(min(decision.wait_seconds, end - now))
            continue
        taken.append((decision.slot_at, numbers_of(decision)))
        await subject.answer(decision)
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


async def test_a_quota_is_a_ceiling_and_others_fill_the_batches(opened: Open) -> None:
    """Whatever its caller asks: in no window more than it allows, nearly that, and every batch is full."""
    bounds = limits(batch_pairs=20, calls_per_second=50)
    async with opened(bounds, quotas(rate("held", 100))) as subject:
        await subject.ask(pairs(range(500)), asker("held"))
        await subject.ask(pairs(range(1000, 3000)), asker("free"))
        taken = await batches(subject, seconds=0.35)
    of_held = sum(number < 1000 for _, numbers in taken for number in numbers)
    assert most_over(taken, lambda number: number < 1000, 100) <= 1
    assert of_held >= 0.8 * 100 * (taken[-1][0] - taken[0][0]) - 2
    assert all(len(numbers) == 20 for _, numbers in taken)


async def test_a_quota_is_a_ceiling_where_nobody_else_asks(opened: Open) -> None:
    """Idle slots are not given to a caller whose quota is spent; a claim says when to come back."""
    async with opened(limits(batch_pairs=20), quotas(rate("held", 100))) as subject:
        await subject.ask(pairs(range(500)), asker("held"))
        taken = await batches(subject, seconds=0.3)
        assert most_over(taken, lambda _: True, 100) <= 1
        assert sum(len(numbers) for _, numbers in taken) >= 15
        decision = await subject.queue.claim()
        while isinstance(decision, Claim):
            decision = await subject.queue.claim()
        assert 0 < decision.wait_seconds < 0.2


async def test_interactive_pairs_of_a_quota_go_first(opened: Open) -> None:
    """A caller's own bulk does not use up what its interactive pairs need, tenth or not."""
    async with opened(limits(batch_pairs=20), quotas(rate("held", 10)), begun=True) as subject:
        await subject.ask(pairs(range(100, 200)), asker("held", "bulk"))
        await subject.ask(pairs(range(8)), asker("held"))
        subject.age_quotas(HOUR_SECONDS)
        assert sorted(numbers_of(await subject.take())) == [*range(8), 100]


async def test_more_than_may_wait_is_refused_whole(opened: Open) -> None:
    """Of both priorities, in words that name the quota; what joins needs no room, and others have theirs."""
    async with opened(limits(batch_pairs=4), quotas(Quota("small", queued_pairs=6))) as subject:
        with pytest.raises(OverQuota, match=r"queued_pairs of caller 'small': 0 .* 7 .* 6") as over:
            await subject.ask(pairs(range(7)), asker("small"))
        assert (over.value.account, over.value.quota) == ("small", "queued_pairs")
        assert over.value.retry_after_seconds >= 1
        assert await subject.nothing_waits()
        await subject.ask(pairs(range(4)), asker("small"))
        await subject.ask(pairs(range(4, 6)), asker("small", "bulk"))
        with pytest.raises(OverQuota):
            await subject.ask([pair(6)], asker("small", "bulk"))
        await subject.ask(pairs(range(100, 120)), asker("other"))
        await subject.ask(pairs(range(100, 120)), asker("small"))
        claim = await subject.take()
        while not any(number < 6 for number in numbers_of(claim)):
            claim = await subject.take()
        await subject.ask([pair(6)], asker("small"))


async def test_a_large_request_is_measured_whole(opened: Open) -> None:
    """Over several script calls' worth too, one after the other and at once."""
    async with opened(quotas=quotas(Quota("c", queued_pairs=1600))) as subject:
        with pytest.raises(OverQuota):
            await subject.ask(pairs(range(1601)))
        assert await subject.nothing_waits()
        asks = [subject.ask(pairs(range(start, start + 900))) for start in (0, 2000)]
        ends = await asyncio.gather(*asks, return_exceptions=True)
        assert [type(end).__name__ for end in ends].count("OverQuota") == 1
        await subject.ask(pairs(range(5000, 5700)))


async def test_a_deadline_before_the_quotas_turn_is_refused_at_once(opened: Open) -> None:
    """In words that name the quota; whoever waits longer, or is another, is let in."""
    async with opened(quotas=quotas(rate("held", 10))) as subject:
        await subject.ask(pairs(range(100)), asker("held", patience=60))
        with pytest.raises(OverQuota, match="quota pairs_per_second of caller 'held': at 10 pairs") as over:
            await subject.ask([pair(1000)], asker("held", patience=5))
        assert over.value.quota == "pairs_per_second"
        assert 3 < over.value.retry_after_seconds < 7
        with pytest.raises(OverQuota):
            await subject.ask(pairs(range(2000, 2100)), asker("held", "bulk", patience=12))
        await subject.ask([pair(1000)], asker("held", patience=20))
        await subject.ask(pairs(range(3000, 3005)), asker("other", patience=1))


async def test_a_flood_under_a_quota_makes_nobody_elses_turn_look_late(opened: Open) -> None:
    """Who asks behind it is admitted by what may go before it, not by all that waits."""
    bounds = limits(batch_pairs=10, calls_per_second=1, pairs_per_second=10)
    async with opened(bounds, quotas(rate("flood", 1))) as subject:
        await subject.ask(pairs(range(500)), asker("flood", patience=1000))
        await subject.ask(pairs(range(1000, 1020)), asker("other", patience=5))
        await subject.ask(pairs(range(2000, 2004)), asker("bulk", "bulk", patience=6))


async def test_a_pair_goes_out_by_whichever_quota_has_room(opened: Open) -> None:
    """Who joins a pair that a quota holds back need not wait for that, nor does who came first."""
    async with opened(limits(batch_pairs=10), quotas(rate("slow", 0.01), rate("quick", 1e6))) as subject:
        await subject.ask(pairs(range(100)), asker("slow", patience=30_000))
        await subject.ask(pairs(range(90, 95)), asker("quick", patience=5))
        await subject.ask(pairs(range(80, 85)), asker("free", "bulk", patience=5))
        await subject.ask(pairs(range(200, 205)), asker("quick"))
        await subject.ask(pairs(range(200, 205)), asker("slow", patience=5))
        assert sorted(await subject.drain()) == [*range(80, 85), *range(90, 95), *range(200, 205)]
        with pytest.raises(OverQuota):
            await subject.ask([pair(300)], asker("slow", patience=5))


async def test_a_joined_pair_is_charged_to_whose_turn_it_took(opened: Open) -> None:
    """Asking for what another waits for is no way round a quota."""
    async with opened(
        limits(batch_pairs=10), quotas(rate("slow", 0.01), rate("other", 4)), begun=True
    ) as subject:
        await subject.ask(pairs(range(100)), asker("slow", patience=30_000))
        await subject.ask(pairs(range(100)), asker("other", patience=300))
        subject.age_quotas(1.2)
        taken = await batches(subject, seconds=0.3)
        assert most_over(taken, lambda _: True, 4) <= 1
        assert 4 <= sum(len(numbers) for _, numbers in taken) <= 5


async def test_who_joins_does_not_lose_the_place_that_the_pair_had(opened: Open) -> None:
    """A caller with a quota that asks for another's pair makes it go no later."""
    async with opened(limits(batch_pairs=10), quotas(rate("slow", 0.5))) as subject:
        await subject.ask(pairs(range(50)), asker("slow", patience=300))
        await subject.ask(pairs(range(100, 105)), asker("free", "bulk"))
        await subject.ask(pairs(range(100, 105)), asker("slow", patience=300))
        assert sorted(numbers_of(await subject.take())) == list(range(100, 105))


async def test_made_up_names_share_one_quota(opened: Open) -> None:
    """Many names have together what `others` allows, in the queue as well."""
    others = Quota(OTHERS, pairs_per_second=200, queued_pairs=300)
    async with opened(limits(batch_pairs=10), quotas(others=others)) as subject:
        names = (subject.ask(pairs([name, 500 + name]), asker(f"name {name}")) for name in range(150))
        await asyncio.gather(*names)
        with pytest.raises(OverQuota, match="of all callers without one of their own"):
            await subject.ask([pair(10_000)], asker("one more"))
        taken = await batches(subject, seconds=0.2)
    assert most_over(taken, lambda _: True, 200) <= 1
    seen = [number % 500 for _, numbers in taken for number in numbers]
    assert len(seen) >= 20
    firsts = seen[:90]  # of a hundred names with turns of their own, and one for all others
    assert len(set(firsts)) == len(firsts), "a second pair of somebody's before another's first"


async def test_made_up_names_get_no_more_than_a_turn(opened: Open) -> None:
    """A caller that the file names has half of every batch, however many names the other half has."""
    async with opened(limits(batch_pairs=20), quotas(Quota("named"), others=Quota(OTHERS))) as subject:
        names = (subject.ask(pairs([name, 500 + name]), asker(f"name {name}")) for name in range(150))
        await asyncio.gather(*names)
        await subject.ask(pairs(range(1000, 1100)), asker("named"))
        for _ in range(5):
            claim = await subject.take()
            assert 9 <= sum(number >= 1000 for number in numbers_of(claim)) <= 11
            assert len(claim.pairs) == 20
            await subject.answer(claim)


async def test_accounts_take_turns_in_the_smallest_batches(opened: Open) -> None:
    """Where a call holds one pair, nobody waits for more than one of each other's."""
    names = ("a", "b", "c")
    async with opened(limits(batch_pairs=1), quotas(*map(Quota, names))) as subject:
        for at, name in enumerate((*names, "free")):
            await subject.ask(pairs(range(10 * at, 10 * at + 4)), asker(name))
        seen = [numbers_of(await subject.take())[0] // 10 for _ in range(16)]
        assert all(sorted(seen[start : start + 4]) == [0, 1, 2, 3] for start in (0, 4, 8, 12))


async def test_a_batch_put_back_costs_no_quota(opened: Open) -> None:
    """It may go out again at once, and with what is saved up since: nothing is charged twice."""
    async with opened(limits(batch_pairs=100), quotas(rate("held", 10)), begun=True) as subject:
        await subject.ask(pairs(range(100)), asker("held"))
        subject.age_quotas(HOUR_SECONDS)
        claim = await subject.take()
        assert len(claim.pairs) >= 9
        await subject.queue.put_back(claim)
        again = await subject.take()
        assert numbers_of(again)[: len(claim.pairs)] == numbers_of(claim)


@pytest.mark.parametrize("how", ["fail", "refuse"])
async def test_what_is_sent_again_is_not_charged_again(opened: Open, how: str) -> None:
    """A model that fails, or another's bad pair, takes nothing of a caller's quota."""
    async with opened(limits(batch_pairs=8), quotas(rate("held", 0.01)), begun=True) as subject:
        await subject.ask([pair(1)], asker("held", patience=900))
        subject.age_quotas(HOUR_SECONDS)
        claim = await subject.take()
        if how == "fail":
            await subject.queue.fail(claim, DOWN, retry_after_seconds=0)
        else:
            await subject.queue.refuse(claim, BAD, {pair(2).digest: BAD})
        claim = await subject.take()
        assert numbers_of(claim) == [1]
        await subject.answer(claim)
        await subject.ask(pairs([3, 4]), asker("held", patience=900))
        assert await subject.drain() == []
        subject.age_quotas(104)
        assert await subject.drain() == [3]


async def test_other_quotas_hold_for_those_who_wait_too(opened: Open) -> None:
    """A quota that is raised, taken away or set anew does so for what is in the queue already."""
    async with opened(limits(batch_pairs=50), quotas(rate("c", 0.01))) as subject:
        await subject.ask(pairs(range(50)), asker("c", patience=9000))
        assert not isinstance(await subject.queue.claim(), Claim)
        subject.quotas.now = quotas()
        await subject.poll()
        claim = await subject.take()
        assert sorted(numbers_of(claim)) == list(range(50))
        await subject.answer(claim)
        await subject.ask(pairs(range(100, 150)), asker("c"))
        subject.quotas.now = quotas(rate("c", 0.01))
        await subject.poll()
        assert not isinstance(await subject.queue.claim(), Claim)
        subject.quotas.now = quotas(rate("c", 1e6))
        await subject.poll()
        assert sorted(numbers_of(await subject.take())) == list(range(100, 150))


async def test_what_is_refreshed_is_under_no_quota(opened: Open) -> None:
    """It fills spare places, whoever's stale answers they were."""
    async with opened(limits(batch_pairs=10), quotas(others=rate(OTHERS, 0.01))) as subject:
        await subject.ask(pairs(range(5)), asker("", "refresh"))
        assert sorted(numbers_of(await subject.take())) == list(range(5))
