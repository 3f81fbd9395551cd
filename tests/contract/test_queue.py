"""One suite for both queues: that of one process, and that of all replicas in Redis."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable

import pytest
from grpc import StatusCode

from services.cache_proxy.errors import Nonsense, PairError, QueueFull, Refused, Unavailable
from services.cache_proxy.queue.interface import Claim, NotYet, Outcome, Pair
from services.cache_proxy.queue.local.gcra import PACE
from tests.support.queue_subjects import Open, Subject
from tests.support.replicas import asker, limits, numbers_of, pair, pairs

BAD = Refused(StatusCode.INVALID_ARGUMENT, "bad", ".title", "too odd")
DOWN = Unavailable("down", retry_after_seconds=1.0)


async def test_a_pair_is_queued_joined_sent_and_answered(opened: Open) -> None:
    """Who asks first queues it, who asks next joins it, one batch has it, and the answer ends it."""
    async with opened() as subject:
        assert (await subject.ask([pair(1), pair(2)])).queued == {pair(1).digest, pair(2).digest}
        joined = await subject.ask([pair(2), pair(3)])
        assert joined.queued == {pair(3).digest}
        assert not joined.ended
        claim = await subject.take()
        assert sorted(numbers_of(claim)) == [1, 2, 3]
        assert (await subject.ask([pair(1)])).queued == frozenset()
        assert not isinstance(await subject.queue.claim(), Claim)
        await subject.answer(claim, 5)
        assert subject.ended() == {1: 5, 2: 5, 3: 5}
        assert await subject.nothing_waits()


async def test_texts_reach_the_batch_as_the_first_caller_spelled_them(opened: Open) -> None:
    """Any text of the world's scripts, empty ones too, unchanged."""
    texts = ["", "Zürich Größe", "株式会社", "a\x00b", "x" * 4096, "🙂" * 300]
    wanted = [Pair(number.to_bytes(16, "big"), text, text[::-1]) for number, text in enumerate(texts)]
    async with opened(limits(batch_pairs=10)) as subject:
        await subject.ask(wanted)
        await subject.ask([Pair(item.digest, "other", "spelling") for item in wanted])
        assert sorted(map(repr, (await subject.take()).pairs)) == sorted(map(repr, wanted))


async def test_a_pair_that_nobody_waits_for_is_not_sent(opened: Open) -> None:
    """Who leaves takes along what is unsent; what is in flight ends as it does."""
    async with opened(limits(batch_pairs=2)) as subject:
        await subject.ask(pairs([1, 2]))
        claim = await subject.take()
        await subject.ask(pairs([3, 4]))
        await subject.queue.leave([pair(1).digest, pair(3).digest])
        assert numbers_of(await subject.take()) == [4]
        await subject.answer(claim)
        assert (await subject.ask([pair(1)])).ended == {pair(1).digest: 3}


async def test_an_answer_is_remembered_and_a_whim_is_not(opened: Open) -> None:
    """Who asks again is told a level and a refusal at once; nonsense is asked of the model anew, once."""
    async with opened(limits(batch_pairs=3)) as subject:
        await subject.ask(pairs([1, 2, 3]))
        claim = await subject.take()
        await subject.queue.fulfil(claim, {pair(1).digest: 7, pair(2).digest: Nonsense("none")})
        await subject.queue.refuse(claim, BAD, {})
        again = await subject.ask(pairs([1, 2, 3]))
        assert again.ended[pair(1).digest] == 7
        assert again.queued == {pair(2).digest}
        claim = await subject.take()
        await subject.queue.fulfil(claim, {pair(2).digest: Nonsense("none again")})
        nonsense = (await subject.ask(pairs([2]))).ended[pair(2).digest]
        assert isinstance(nonsense, Nonsense)
        assert nonsense.message == "none again"
        refused = again.ended[pair(3).digest]
        assert isinstance(refused, Refused)
        assert (refused.code, refused.message, refused.field, refused.reason) == (
            BAD.code, BAD.message, BAD.field, BAD.reason,
        )  # fmt: skip


async def test_a_batch_ends_in_parts(opened: Open) -> None:
    """What the store knew ends first; the rest stays in flight, and can be put back and answered."""
    async with opened() as subject:
        await subject.ask(pairs([1, 2, 3, 4]))
        claim = await subject.take()
        await subject.queue.fulfil(claim, {pair(1).digest: 1, pair(2).digest: 2})
        assert set(subject.ended()) == {1, 2}
        await subject.queue.put_back(claim)
        claim = await subject.take()
        assert sorted(numbers_of(claim)) == [3, 4]
        await subject.answer(claim)
        assert subject.ended() == {1: 1, 2: 2, 3: 3, 4: 3}
        assert await subject.nothing_waits()


async def test_a_late_answer_counts(opened: Open) -> None:
    """A batch that was put back and is answered all the same leaves nothing to send."""
    async with opened() as subject:
        await subject.ask(pairs([1, 2]))
        claim = await subject.take()
        await subject.queue.put_back(claim)
        await subject.answer(claim, 2)
        assert subject.ended() == {1: 2, 2: 2}
        assert await subject.nothing_waits()


async def test_no_call_before_the_models_pushback(opened: Open) -> None:
    """After a failed call everybody stays away for as long as was said."""
    async with opened() as subject:
        await subject.ask([pair(1)])
        await subject.queue.fail(await subject.take(), DOWN, retry_after_seconds=20)
        decision = await subject.queue.claim()
        assert isinstance(decision, NotYet)
        assert 19 < decision.wait_seconds < 21


async def test_a_batch_put_back_goes_first_again(opened: Open) -> None:
    """It is in front of all that came since, even after its lane was empty."""
    async with opened(limits(batch_pairs=2)) as subject:
        for first in range(0, 40, 2):  # the lane's clock goes far
            await subject.ask(pairs([first, first + 1]))
        for _ in range(19):
            await subject.answer(await subject.take())
        last = await subject.take()
        assert numbers_of(last) == [38, 39]
        await subject.ask(pairs([100, 101, 102, 103]), asker("other"))
        await subject.queue.put_back(last)
        assert sorted(numbers_of(await subject.take())) == [38, 39]


async def test_interactive_first_bulk_a_tenth_refresh_only_spare_places(opened: Open) -> None:
    """A full batch has nine tenths interactive and one bulk; refresh gets what neither wants."""
    async with opened(limits(batch_pairs=20)) as subject:
        await subject.ask(pairs(range(200, 240)), asker(priority="refresh"))
        await subject.ask(pairs(range(100, 120)), asker(priority="bulk"))
        await subject.ask(pairs(range(40)), asker(priority="interactive"))
        seen = []
        for _ in range(4):
            claim = await subject.take()
            lanes = [number // 100 for number in numbers_of(claim)]
            seen.append((lanes.count(0), lanes.count(1), lanes.count(2)))
            await subject.answer(claim)
        assert seen == [(18, 2, 0), (18, 2, 0), (4, 16, 0), (0, 0, 20)]


async def test_bulks_tenth_holds_in_bytes_too(opened: Open) -> None:
    """Long interactive texts fill every batch, and still bulk gets its part of the bytes."""
    async with opened(limits(batch_pairs=100, batch_bytes=20_000)) as subject:
        await subject.ask(pairs(range(100, 150), text="b" * 400), asker(priority="bulk"))
        await subject.ask(pairs(range(100), text="i" * 400))
        claim = await subject.take()
        lanes = [number // 100 for number in numbers_of(claim)]
        assert lanes.count(1) >= 3
        assert lanes.count(0) >= 35
        assert sum(item.size_bytes for item in claim.pairs) <= 20_000


async def test_a_pair_above_the_bytes_of_a_batch_goes_alone(opened: Open) -> None:
    """It is sent, with nothing else; and so are the others, without it."""
    async with opened(limits(batch_pairs=10, batch_bytes=500)) as subject:
        await subject.ask([pair(1, text="x" * 4000), *pairs([2, 3])])
        sizes = []
        for _ in range(2):
            claim = await subject.take()
            sizes.append(sorted(numbers_of(claim)))
            await subject.answer(claim)
        assert sorted(sizes) == [[1], [2, 3]]


async def test_the_better_priority_of_two_counts(opened: Open) -> None:
    """A bulk pair that somebody asks for interactively goes with the interactive ones, and never back."""
    async with opened(limits(batch_pairs=2)) as subject:
        await subject.ask(pairs(range(6)), asker("b", "bulk"))
        await subject.ask([pair(5)], asker("i", "interactive"))
        await subject.ask([pair(5)], asker("b", "bulk"))
        assert 5 in numbers_of(await subject.take())


async def test_a_small_caller_does_not_wait_for_a_big_one(opened: Open) -> None:
    """Two pairs of one caller, asked after 5000 of another, are in the next batch."""
    async with opened(limits(batch_pairs=100)) as subject:
        await subject.ask(pairs(range(5000)), asker("big"))
        await subject.answer(await subject.take())
        await subject.ask(pairs([9001, 9002]), asker("small"))
        assert {9001, 9002} <= set(numbers_of(await subject.take()))


async def test_callers_share_the_batches_evenly(opened: Open) -> None:
    """Three callers with a backlog each get a third, whoever came first."""
    async with opened(limits(batch_pairs=30)) as subject:
        for caller in range(3):
            await subject.ask(pairs(range(caller * 1000, caller * 1000 + 200)), asker(f"caller {caller}"))
        for _ in range(5):
            claim = await subject.take()
            shares = [number // 1000 for number in numbers_of(claim)]
            assert [shares.count(caller) for caller in range(3)] == [10, 10, 10]
            await subject.answer(claim)


async def test_a_request_above_the_bound_in_pairs_is_refused_whole(opened: Open) -> None:
    """Over several script calls' worth too: nothing of it is queued, and what joins needs no room."""
    async with opened(limits(batch_pairs=1000, max_pairs=1600)) as subject:
        with pytest.raises(QueueFull) as full:
            await subject.ask(pairs(range(1601)))
        assert full.value.retry_after_seconds >= 1
        assert await subject.nothing_waits()
        await subject.ask(pairs(range(1600)))
        with pytest.raises(QueueFull):
            await subject.ask([pair(5000)])
        assert (await subject.ask(pairs(range(1600)))).queued == frozenset()
        await subject.answer(await subject.take())
        await subject.ask([pair(5000)])


async def test_a_request_above_the_bound_in_bytes_is_refused_whole(opened: Open) -> None:
    """The bytes of all of it count, not of its first part."""
    async with opened(limits(batch_pairs=1000, max_bytes=1000 * pair(10**6).size_bytes)) as subject:
        with pytest.raises(QueueFull):
            await subject.ask(pairs(range(10**6, 10**6 + 1001)))
        assert await subject.nothing_waits()
        await subject.ask(pairs(range(10**6, 10**6 + 1000)))


async def test_a_request_that_joins_first_is_still_bounded(opened: Open) -> None:
    """Pairs that wait already let nothing in that follows them, and a refused request leaves nothing."""
    async with opened(limits(batch_pairs=1000, max_pairs=1000)) as subject:
        await subject.ask(pairs(range(600)))
        with pytest.raises(QueueFull):
            await subject.ask(pairs(range(2000)))
        claim = await subject.take()
        assert sorted(numbers_of(claim)) == list(range(600))
        await subject.answer(claim)
        assert await subject.nothing_waits()


SLOW = limits(batch_pairs=10, calls_per_second=1, pairs_per_second=10)


async def test_who_would_wait_too_long_is_told_at_once(opened: Open) -> None:
    """With 30 batches of its own ahead, one a second, a deadline in five seconds is hopeless, for pairs that
    wait already too; one in 60 is not. A refused request changes nothing.
    """  # noqa: D205 - one thought
    async with opened(SLOW) as subject:
        await subject.ask(pairs(range(300)), asker("a", patience=60))
        with pytest.raises(QueueFull, match="would wait"):
            await subject.ask([pair(1000)], asker("a", patience=5))
        with pytest.raises(QueueFull, match="would wait"):
            await subject.ask([pair(1), pair(250)], asker("b", patience=5))
        await subject.ask([pair(1000)], asker("a", patience=60))
        assert (await subject.ask([pair(5)], asker("b", patience=5))).queued == frozenset()


async def test_a_small_caller_is_admitted_by_its_own_turn(opened: Open) -> None:
    """Behind 30 batches of another's it goes out in the next call, so five seconds are enough; not for 80
    pairs, to which every other place of a call is left.
    """  # noqa: D205 - one thought
    async with opened(SLOW) as subject:
        await subject.ask(pairs(range(300)), asker("a", patience=60))
        await subject.ask(pairs([1000, 1001]), asker("b", patience=5))
        with pytest.raises(QueueFull, match="would wait"):
            await subject.ask(pairs(range(2000, 2080)), asker("c", patience=5))


async def test_bulk_is_admitted_by_its_tenth(opened: Open) -> None:
    """With interactive enough for a minute, a bulk pair goes out in the next call; five take five."""
    async with opened(SLOW) as subject:
        await subject.ask(pairs(range(600)), asker("a", patience=120))
        await subject.ask([pair(1000)], asker("b", "bulk", patience=3))
        with pytest.raises(QueueFull, match="would wait"):
            await subject.ask(pairs(range(1001, 1006)), asker("b", "bulk", patience=3))
        await subject.ask(pairs(range(1001, 1006)), asker("b", "bulk", patience=9))


async def test_asking_with_a_better_priority_is_admitted_by_that(opened: Open) -> None:
    """A bulk pair far behind is not too late for an interactive caller, who promotes it."""
    async with opened(SLOW) as subject:
        await subject.ask(pairs(range(600)), asker("a", "bulk", patience=120))
        with pytest.raises(QueueFull, match="would wait"):
            await subject.ask([pair(599)], asker("b", "bulk", patience=5))
        await subject.ask([pair(599)], asker("b", patience=5))
        claim = await subject.take()
        assert 599 in numbers_of(claim)


async def test_a_batch_waits_for_company_but_not_when_it_is_full(opened: Open) -> None:
    """The linger holds a lone pair back; a batch that is full goes at once."""
    async with opened(limits(batch_pairs=3, linger_seconds=30)) as subject:
        await subject.ask([pair(1)])
        decision = await subject.queue.claim()
        assert isinstance(decision, NotYet)
        assert 29 < decision.wait_seconds <= 30
        await subject.ask(pairs([2, 3]))
        assert len((await subject.take()).pairs) == 3


async def _find_bad(
    subject: Subject, bad: set[int], end: Callable[[Claim], Awaitable[None]] | None = None
) -> list[list[int]]:
    """Be a model that refuses any batch with one of `bad` in it (or ends it so); the batches it saw."""
    calls: list[list[int]] = []
    for _ in range(500):
        decision = await subject.queue.claim()
        if isinstance(decision, NotYet):
            if math.isinf(decision.wait_seconds):
                return calls
            await asyncio.sleep(decision.wait_seconds)
            continue
        calls.append(numbers_of(decision))
        if not bad.intersection(numbers_of(decision)):
            await subject.answer(decision)
        elif end:
            await end(decision)
        else:
            await subject.queue.refuse(decision, BAD, {})
    raise AssertionError("no end")


async def _ends(subject: Subject, numbers: list[int]) -> dict[int, Outcome]:
    return {
        int.from_bytes(digest, "big"): outcome
        for digest, outcome in (await subject.ask(pairs(numbers))).ended.items()
    }


async def test_unnamed_bad_pairs_are_found_by_halving(opened: Open) -> None:
    """Two of 64: exactly those are refused, all others answered, in about two calls a halving."""
    async with opened(limits(batch_pairs=64)) as subject:
        await subject.ask(pairs(range(64)))
        calls = await _find_bad(subject, {7, 50})
        ends = await _ends(subject, list(range(64)))
        assert {number for number, end in ends.items() if isinstance(end, Refused)} == {7, 50}
        assert len(ends) == 64
        assert len(calls) <= 30


async def test_suspects_are_split_by_caller_first(opened: Open) -> None:
    """The caller whose pairs are fine is answered by the first probe, not after the last."""
    async with opened(limits(batch_pairs=40)) as subject:
        await subject.ask(pairs(range(100, 120)), asker("bad"))
        await subject.ask(pairs(range(20)), asker("good"))
        calls = await _find_bad(subject, {105})
        assert all(len({number // 100 for number in call}) == 1 for call in calls[1:])


async def test_a_named_pair_ends_alone(opened: Open) -> None:
    """The model says which: that one is refused in its words, the others are sent again together."""
    async with opened(limits(batch_pairs=10)) as subject:
        await subject.ask(pairs(range(10)))
        claim = await subject.take()
        named = Refused(StatusCode.OUT_OF_RANGE, "title 4", ".title", "too long")
        await subject.queue.refuse(claim, BAD, {pair(4).digest: named})
        claim = await subject.take()
        assert sorted(numbers_of(claim)) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        await subject.answer(claim)
        found = (await _ends(subject, [4]))[4]
        assert isinstance(found, Refused)
        assert (found.code, found.message) == (named.code, named.message)


async def test_probes_are_every_fourth_call_while_others_wait(opened: Open) -> None:
    """Bad pairs of one caller leave three calls of four to the others."""
    async with opened(limits(batch_pairs=10)) as subject:
        await subject.ask(pairs(range(10)), asker("bad"))
        first = await subject.take()
        await subject.queue.refuse(first, BAD, {})
        await subject.ask(pairs(range(100, 400)), asker("good"))
        kinds = []
        for _ in range(16):
            claim = await subject.take()
            kinds.append(max(numbers_of(claim)) < 100)
            if 3 in numbers_of(claim):
                await subject.queue.refuse(claim, BAD, {})
            else:
                await subject.answer(claim)
        assert all(sum(kinds[start : start + 4]) <= 1 for start in range(13))
        assert sum(kinds) >= 3


async def test_a_pair_refused_32_times_ends(opened: Open) -> None:
    """A model that refuses everything ends every pair in the end, each with its error."""
    async with opened(limits(batch_pairs=8)) as subject:
        await subject.ask(pairs(range(8)))
        await _find_bad(subject, set(range(8)))
        ends = await _ends(subject, list(range(8)))
        assert len(ends) == 8
        assert all(isinstance(end, PairError) for end in ends.values())


@pytest.mark.slow
async def test_a_batch_that_leaves_late_moves_the_next_slot(opened: Open) -> None:
    """By as much as it is late, the last word counts; not when the next slot is another's already."""
    async with opened(limits(batch_pairs=1, calls_per_second=0.5)) as subject:
        await subject.ask(pairs(range(3)))
        decision = await subject.queue.claim()
        assert isinstance(decision, NotYet)
        await asyncio.sleep(decision.wait_seconds)
        begun_at = time.monotonic()
        first = await subject.take()
        unsure = time.monotonic() - begun_at  # of when its slot is, for a queue with another clock
        for late_seconds in (0.3, 0.5, 0.5):
            assert await subject.queue.late(first, seconds=late_seconds)
            asked_at = time.monotonic()
            decision = await subject.queue.claim()
            assert isinstance(decision, NotYet)
            earliest, latest = (
                at + decision.wait_seconds - first.slot_at for at in (asked_at, time.monotonic())
            )
            assert earliest - unsure - 0.1 <= 2 / PACE + late_seconds <= latest + unsure + 0.1
        await asyncio.sleep(decision.wait_seconds)
        await subject.take()
        assert not await subject.queue.late(first, seconds=0.5)


async def test_a_batch_that_is_late_and_goes_back_leaves_the_slot_free(opened: Open) -> None:
    """What was said of its lateness is undone with it."""
    async with opened(limits(batch_pairs=1, calls_per_second=0.5)) as subject:
        await subject.ask(pairs([1]))
        decision = await subject.queue.claim()
        assert isinstance(decision, NotYet)
        await asyncio.sleep(decision.wait_seconds)
        claim = await subject.take()
        assert await subject.queue.late(claim, seconds=0.5)
        await subject.queue.put_back(claim)
        decision = await subject.queue.claim()
        assert isinstance(decision, Claim) or decision.wait_seconds < 0.1
        assert not await subject.queue.late(claim, seconds=0.1)


async def test_a_pair_that_breaks_the_model_is_found(opened: Open) -> None:
    """Calls with it fail as the model's own breakdown: failed twice, the batch is halved, and only that pair
    ends without a level, remembered for a while.
    """  # noqa: D205 - one thought
    async with opened(limits(batch_pairs=8)) as subject:
        await subject.ask(pairs(range(8)))

        async def breaks(claim: Claim) -> None:
            await subject.queue.fail(claim, DOWN, retry_after_seconds=0, suspicious=True)

        calls = await _find_bad(subject, {5}, breaks)
        ends = await _ends(subject, list(range(8)))
        assert {number: type(end) for number, end in ends.items()} == {
            number: Unavailable if number == 5 else int for number in range(8)
        }
        assert calls.count(calls[0]) == 2
        assert len(calls) <= 2 + 2 * 3


@pytest.mark.parametrize("patience", [(0.3, 60.0), (60.0, 0.3)], ids=["joined later", "joined before"])
async def test_a_pair_is_wanted_until_the_latest_deadline_of_all_who_wait(
    opened: Open, patience: tuple[float, float]
) -> None:
    """Whoever joins it with more time keeps it, with less takes nothing from it; also after the queue was
    asked for everything again.
    """  # noqa: D205 - one thought
    async with opened() as subject:
        for seconds in patience:
            await subject.ask([pair(1)], asker(patience=seconds))
        await subject.poll()
        await asyncio.sleep(0.35)
        assert numbers_of(await subject.take()) == [1]
