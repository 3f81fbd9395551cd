"""Events that meet: questions, goodbyes, late answers, refusals, a model that is down; and what it costs."""

import asyncio
import time

import pytest
from grpc import StatusCode

from services.cache_proxy.cache.cache_scripts import BURY
from services.cache_proxy.cache.invalidation import Follower, InvalidationLog
from services.cache_proxy.errors import Nonsense, QueueFull, Refused, Unavailable
from services.cache_proxy.queue.interface import Claim, NotYet, Pair
from services.cache_proxy.redis_client.client_factory import connect, servers
from tests.support.replicas import Place, Replica, asker, limits, numbers_of, pair, pairs, replicas

REFUSED = Refused(StatusCode.INVALID_ARGUMENT, "bad")
DOWN = Unavailable("down", retry_after_seconds=1.0)


@pytest.fixture
def place(shared_redis: str) -> Place:
    """A deployment of the test's own."""
    return Place.new(shared_redis)


def _interest(place: Place) -> int:
    with place.client() as client:
        return int(client.hlen(f"{place.keys.base}pairs"))


async def test_a_goodbye_never_undoes_the_next_question(place: Place) -> None:
    """One caller leaves while the next asks for the same pairs: these wait, whatever is sent first."""
    async with replicas(place) as (replica,):
        for turn in range(20):
            numbers = range(turn * 700, turn * 700 + 700)
            wait, _ = await replica.ask(pairs(numbers))
            leaving = asyncio.create_task(replica.close(wait))
            await asyncio.sleep(0)
            again, _ = await replica.ask(pairs(numbers))
            await leaving
            assert _interest(place) == 700
            await replica.close(again)
            assert _interest(place) == 0
        assert place.left() == {}


@pytest.mark.parametrize("slow", [(0.05,), (0.0, 0.05)])
async def test_a_slow_connection_changes_no_order(slow: tuple[float, ...], place: Place) -> None:
    """The goodbye, or the question after it, is long on its way: the pair waits all the same."""
    async with replicas(place) as (replica,):
        wait, _ = await replica.ask([pair(1)])
        replica.client.slow = slow
        leaving = asyncio.create_task(replica.close(wait))
        await asyncio.sleep(0)
        await replica.ask([pair(1)])
        await leaving
        assert _interest(place) == 1


async def test_a_question_that_is_long_on_its_way_is_taken_back(place: Place) -> None:
    """Its caller goes before it arrives: the goodbye arrives after it."""
    async with replicas(place) as (replica,):
        wait = replica.waiters.open([pair(1).digest])
        replica.client.slow = (0.05,)
        asking = asyncio.create_task(replica.queue.enqueue([pair(1)], asker()))
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await replica.close(wait)
        assert _interest(place) == 0


async def test_who_goes_while_asking_leaves_nothing(place: Place) -> None:
    """Cancelled at any moment of asking for several calls' worth: no pair stays that nobody waits for."""
    async with replicas(place) as (replica,):
        for delay in range(20):
            wanted = pairs(range(1300))
            wait = replica.waiters.open([item.digest for item in wanted])
            asking = asyncio.create_task(replica.queue.enqueue(wanted, asker()))
            await asyncio.sleep(delay * 0.002)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await replica.close(wait)
            assert _interest(place) == 0
            assert replica.queue.noted() == {}


async def test_who_is_refused_takes_nobodys_place(place: Place) -> None:
    """A request that does not fit joined pairs of another; that one is still answered."""
    async with replicas(place, 1, limits(batch_pairs=1000, max_pairs=1000)) as (replica,):
        wait, _ = await replica.ask(pairs(range(500)))
        with pytest.raises(QueueFull):
            await replica.ask(pairs(range(1200)))
        assert replica.queue.noted().keys() == {item.digest for item in pairs(range(500))}
        assert _interest(place) == 500
        claim = await replica.take()
        await replica.queue.fulfil(claim, {item.digest: 2 for item in claim.pairs})
        assert not wait.open
        assert place.left() == {}


async def test_two_that_ask_at_once_do_not_share_a_refusal(place: Place) -> None:
    """The one without time is refused, the other, for the same pair and at the same moment, waits."""
    bounds = limits(batch_pairs=1, calls_per_second=0.2)
    async with replicas(place, 1, bounds) as (replica,):
        await replica.ask(pairs(range(3)))
        hasty = asyncio.create_task(replica.ask([pair(9)], asker("a", patience=0.5)))
        patient = asyncio.create_task(replica.ask([pair(9)], asker("b", patience=500)))
        with pytest.raises(QueueFull):
            await hasty
        wait, _ = await patient
        assert pair(9).digest in replica.queue.noted()
        await replica.queue.publish({pair(9).digest: 5})
        await replica.messages()
        assert list(wait.outcomes.values()) == [5]


async def test_the_answer_of_a_claim_that_was_given_away_ends_both(place: Place) -> None:
    """Its owner was thought dead, another sends the pairs again: the first answer ends them."""
    async with replicas(place, 2) as (slow, other):
        await slow.ask(pairs([1, 2]))
        await other.ask(pairs([1, 2]))
        first = await slow.take()
        place.age_claims(60_000)
        second = await other.take()
        await slow.queue.fulfil(first, {item.digest: 3 for item in first.pairs})
        await other.messages()
        assert sorted(level for _, level in other.settled) == [3, 3]  # type: ignore[type-var]
        await other.queue.refuse(second, REFUSED, {})
        assert other.queue.held == []
        assert place.left() == {}
        assert (await other.ask(pairs([1])))[1].ended == {pair(1).digest: 3}


async def test_nonsense_that_is_told_twice_is_a_whim_still(place: Place) -> None:
    """The reply was lost, so the script ran again: whoever comes back is asked for, as after one answer."""
    async with replicas(place) as (replica,):
        await replica.ask(pairs([1]))
        claim = await replica.take()
        replica.client.lose = 1
        await replica.queue.fulfil(claim, {pair(1).digest: Nonsense("none")})
        assert (await replica.ask(pairs([1])))[1].queued
        await replica.queue.fulfil(await replica.take(), {pair(1).digest: Nonsense("none")})
        assert not (await replica.ask(pairs([1])))[1].queued


async def test_a_refusal_reaches_who_asked_meanwhile_elsewhere(place: Place) -> None:
    """Another replica joined a pair in flight: it is told of the refusal, and so is who asks later."""
    async with replicas(place, 2) as (one, other):
        await one.ask(pairs([1]))
        claim = await one.take()
        wait, _ = await other.ask(pairs([1]))
        await one.queue.refuse(claim, REFUSED, {})
        await other.messages()
        assert [type(outcome) for outcome in wait.outcomes.values()] == [Refused]
        _, again = await other.ask(pairs([1]))
        assert [type(outcome) for outcome in again.ended.values()] == [Refused]


async def _is_refused(replica: Replica, wanted: list[Pair]) -> bool:
    try:
        await replica.ask(wanted)
    except Unavailable:
        return True
    return False


async def test_a_model_that_is_down_ends_all_that_waits_everywhere(place: Place) -> None:
    """After the retry window: everybody is told, nothing stays queued, the next are told at once."""
    async with replicas(place, 2, limits(retry_window_seconds=0.3)) as (one, other):
        await one.ask(pairs(range(50)))
        wait, _ = await other.ask(pairs(range(30, 60)))
        while wait.open:
            one.queue._not_before = 0
            claim = await one.take()
            await asyncio.sleep(claim.send_at - time.monotonic())
            await one.queue.fail(claim, DOWN)
            await other.messages()
        assert {type(outcome) for outcome in wait.outcomes.values()} == {Unavailable}
        assert not wait.open
        assert place.left() == {}
        while await _is_refused(other, [pair(100)]):  # noqa: ASYNC110 - a backoff has no event
            await asyncio.sleep(0.05)
        await other.queue.fail(await other.take(), DOWN, retry_after_seconds=5)
        assert await _is_refused(one, [pair(101)])
        assert place.left() == {}


async def test_what_is_in_flight_when_the_model_is_taken_for_down_may_be_answered(place: Place) -> None:
    """It stays in its claim: nobody sends it a second time, and its answer counts."""
    async with replicas(place, 2, limits(retry_window_seconds=0.3)) as (one, other):
        await one.ask(pairs([1]))
        flying = await one.take()
        wait, _ = await other.ask(pairs([2]))
        while wait.open:
            other.queue._not_before = 0
            claim = await other.take()
            await asyncio.sleep(claim.send_at - time.monotonic())
            await other.queue.fail(claim, DOWN)
            await other.messages()
        await other.ask(pairs([1]))
        assert not isinstance(await other.queue.claim(), Claim)
        await one.queue.fulfil(flying, {pair(1).digest: 6})
        await other.messages()
        assert (pair(1).digest, 6) in other.settled
        assert place.left() == {}


async def test_a_replica_whose_calls_fail_lets_another_have_the_next_slot(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays away a little longer, and who was told that nothing waits is woken."""
    monkeypatch.setattr(
        "services.cache_proxy.queue.redis_queue._DEFER_SECONDS", 60
    )  # longer than a slow test takes
    async with replicas(place, 2) as (broken, sound):
        await broken.ask(pairs([1]))
        await sound.ask(pairs([1]))
        claim = await broken.take()
        await sound.messages()
        sound.queue._changed.clear()
        assert not isinstance(await sound.queue.claim(), Claim)
        await broken.queue.fail(claim, DOWN, retry_after_seconds=0)
        await sound.messages()
        await asyncio.wait_for(sound.queue.changed(), 30)
        assert isinstance(await broken.queue.claim(), NotYet)
        assert numbers_of(await sound.take()) == [1]


async def test_replica_whose_calls_are_answered_waits_for_the_next_slot_of_a_slow_limit(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It claims for another replica whose call failed, also when the next slot is far away."""
    monkeypatch.setattr("services.cache_proxy.queue.redis_queue._HELP_SECONDS", 0.05)
    monkeypatch.setattr("services.cache_proxy.queue.redis_queue._DEFER_SECONDS", 60)
    async with replicas(place, 2, limits(calls_per_second=3)) as (broken, sound):
        await broken.ask(pairs([1]))
        claim = await broken.take()
        await broken.queue.fail(claim, DOWN)
        await sound.messages()
        assert numbers_of(await sound.take()) == [1]


async def test_replica_whose_call_failed_leaves_the_next_slot_of_a_slow_limit_to_others(place: Place) -> None:
    """Its backoff may end before the limit allows a call: it stays away until another could have taken it."""
    bounds = limits(calls_per_second=0.01)
    async with replicas(place, 1, bounds) as (broken,):
        await broken.ask(pairs([1]))
        with place.client() as client:
            client.hset(place.keys.limit, mapping={"pairs_tat": 0, "calls_tat": 0, "run": broken.queue.run})
        claim = await broken.take()
        await broken.queue.fail(claim, DOWN)
        decision = await broken.queue.claim()
        assert isinstance(decision, NotYet)
        assert decision.wait_seconds > bounds.slot_seconds


async def test_callers_with_ever_new_names_take_bounded_memory(place: Place) -> None:
    """Names are theirs to choose: beyond a thousand they share one turn, and nothing is lost."""
    async with replicas(place, 1, limits(batch_pairs=500)) as (replica,):
        await asyncio.gather(*(replica.ask([pair(number)], asker(f"n{number}")) for number in range(3000)))
        with place.client() as client:
            assert client.hlen(f"{place.keys.base}fair:interactive") <= 1600
        seen: list[int] = []
        while isinstance(claim := await replica.queue.claim(), Claim):
            seen += numbers_of(claim)
            await replica.queue.fulfil(claim, {item.digest: 1 for item in claim.pairs})
        assert sorted(seen) == list(range(3000))


async def test_many_callers_are_asked_for_again_together(place: Place) -> None:
    """A thousand callers of a pair each: the poll is a few calls of Redis, not one for each of them."""
    async with replicas(place, 1, limits(batch_pairs=1000)) as (replica,):
        await asyncio.gather(*(replica.ask([pair(number)], asker(f"n{number}")) for number in range(1000)))
        with place.client() as client:

            def calls() -> int:
                return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])

            client.delete(f"{place.keys.base}pairs", f"{place.keys.base}lane:interactive")
            before = calls()
            await replica.queue.ask_again()
            assert calls() - before <= 5
        assert len(numbers_of(await replica.take())) == 1000


async def test_long_texts_go_in_small_calls(place: Place) -> None:
    """Of one request or of many at once, asked or asked again: no call is long enough to hold Redis up."""
    wanted = [Pair(item.digest, item.company + "c" * 4000, "t" * 4000) for item in pairs(range(700))]
    async with replicas(place, 1, limits(batch_pairs=1000, batch_bytes=10**7)) as (replica,):
        replica.client.most_bytes = 800_000
        some = [wanted[at : at + 20] for at in range(300, 700, 20)]
        await asyncio.gather(*map(replica.ask, [wanted[:300], *some]))
        place.flush()
        await replica.queue.ask_again()
        assert _interest(place) == 700


async def test_pairs_that_nobody_waits_for_any_more_are_cleared_away_in_parts(place: Place) -> None:
    """A replica died with 10000 waiting pairs, whose time runs out: no script looks at all at once."""
    async with replicas(place, 2, limits(batch_pairs=1000)) as (dead, other):
        patience = 1.5
        await dead.ask(pairs(range(10_000)), asker(patience=patience))
        until = time.monotonic() + patience
        await dead.die()
        await other.ask([pair(10**6)], asker("late", "bulk"))
        await asyncio.sleep(until - time.monotonic() + 0.01)
        left = [_interest(place)]
        while not isinstance(claim := await other.queue.claim(), Claim):
            left.append(_interest(place))
            assert left[-2] - left[-1] <= 3500
        assert numbers_of(claim) == [10**6]
        await other.queue.fulfil(claim, {pair(10**6).digest: 1})
        for turn in range(10):
            await other.ask([pair(10**6 + 1 + turn)])
            claim = await other.take()
            await other.queue.fulfil(claim, {item.digest: 1 for item in claim.pairs})
        assert place.left() == {}


async def test_a_thousand_pairs_cost_six_commands_and_no_long_stop_of_redis(place: Place) -> None:
    """Two to ask, one to claim, two to answer; the fleet's other calls wait for none of them for long."""
    async with replicas(place, 1, limits(batch_pairs=1000)) as (replica,):
        with place.client() as client:

            def busy_seconds() -> float:  # what it worked, not what it waited for a busy machine
                found = client.info("cpu")
                return float(found["used_cpu_user"] + found["used_cpu_sys"])

            before, busy_before = 0, 0.0
            for warm in (range(5000, 5010), range(1000)):
                before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
                busy_before = busy_seconds()
                await replica.ask(pairs(warm, text="some title of a job"))
                claim = await replica.take()
                await replica.queue.fulfil(claim, {item.digest: 1 for item in claim.pairs})
            assert busy_seconds() - busy_before < 0.3
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 6


@pytest.mark.parametrize("all_of_them", [False, True])
async def test_what_is_invalidated_in_flight_is_given_to_its_waiters_alone(
    shared_redis: str, all_of_them: bool
) -> None:
    """Whoever asks after its answer came has it asked anew; a pair that nobody invalidated is remembered."""
    place = Place.new(shared_redis)
    async with replicas(place, 1) as (one,):
        await one.ask(pairs([0]))
        await one.queue.fulfil(before := await one.take(), {pair.digest: 5 for pair in before.pairs})
        wait, _ = await one.ask(pairs([1, 2]))
        claim = await one.take()
        with place.client() as client:
            buried = b"" if all_of_them else pairs([1])[0].digest
            client.eval(BURY.text, 1, f"{place.keys.base}tombs", buried)
        await one.queue.fulfil(claim, {pair.digest: 3 for pair in claim.pairs})
        assert set(wait.outcomes.values()) == {3}
        _, again = await one.ask(pairs([1, 2]))
        known = [] if all_of_them else [pairs([2])[0].digest]
        assert list(again.ended) == known
        await one.take()


async def test_answer_invalidated_in_flight_is_logged_as_its_pair_ends(shared_redis: str) -> None:
    """The claimer may die before it stores the answer: memories that took it forget it all the same."""
    place = Place.new(shared_redis)
    async with replicas(place, 1) as (one,):
        reached = servers(connect(shared_redis, timeout_seconds=5))
        forgotten: list[bytes] = []
        follower = Follower(
            InvalidationLog(reached, place.keys.log), remove=forgotten.append, clear=lambda: None
        )
        await follower.poll()
        await one.ask(pairs([1, 2]))
        claim = await one.take()
        with place.client() as client:
            client.eval(BURY.text, 1, f"{place.keys.base}tombs", pair(1).digest)
        await one.ask(pairs([1]))  # it knows of the invalidation, and gets the answer of before
        await one.queue.fulfil(claim, {item.digest: 3 for item in claim.pairs})
        await follower.poll()
        assert forgotten == [pair(1).digest]
        await reached.close()


async def test_a_late_answer_of_what_was_invalidated_is_not_remembered(shared_redis: str) -> None:
    """When its claim is over nobody knows since when it was on its way, so any tombstone counts."""
    place = Place.new(shared_redis)
    async with replicas(place, 1) as (one,):
        await one.ask(pairs([1, 2]))
        claim = await one.take()
        await one.queue.put_back(claim)
        with place.client() as client:
            client.eval(BURY.text, 1, f"{place.keys.base}tombs", pairs([1])[0].digest)
        await one.queue.fulfil(claim, {pair.digest: 3 for pair in claim.pairs})
        _, again = await one.ask(pairs([1, 2]))
        assert list(again.ended) == [pairs([2])[0].digest]


async def test_who_only_joined_leaves_the_next_call_to_who_queued(place: Place) -> None:
    """It asks for none until that replica should have had one, and then does: that one may be gone."""
    async with replicas(place, 2) as (first, second):
        await first.ask(pairs([1, 2]))
        assert first.queue._changed.is_set()
        second.queue._changed.clear()
        await second.ask(pairs([1, 2]))
        await second.ask(pairs([2]))
        assert not second.queue._changed.is_set()
        await asyncio.wait_for(second.queue.changed(), 30)
        await second.ask(pairs([2, 3]))
        assert second.queue._changed.is_set()


@pytest.mark.parametrize(("before", "now"), [("bulk", "interactive"), ("refresh", "bulk")])
async def test_who_joins_with_a_better_priority_asks_for_a_call_at_once(
    before: str, now: str, place: Place
) -> None:
    """What waits has changed, and perhaps when a call is due: who queued it does not know of that."""
    async with replicas(place, 2) as (first, second):
        await first.ask(pairs([1]), asker(priority=before))
        second.queue._changed.clear()
        await second.ask(pairs([1]), asker(priority=now))
        assert second.queue._changed.is_set()


async def test_an_answer_wakes_only_who_still_waits(place: Place) -> None:
    """Of two replicas whose pairs are answered, the one that waits for others too asks for a call; soon."""
    async with replicas(place, 2) as (first, second):
        await first.ask(pairs([1, 2]))
        claim = await first.take()
        await second.ask(pairs([1]))
        await first.ask(pairs([3]))
        for replica in (first, second):
            replica.queue._changed.clear()
        await first.queue.fulfil(claim, {item.digest: 1 for item in claim.pairs})
        await second.messages()
        await first.messages()
        await asyncio.wait_for(first.queue.changed(), 30)
        assert not second.queue._changed.is_set()


async def test_who_only_joined_hears_when_nobody_waits_any_more_where_it_was_queued(place: Place) -> None:
    """That replica asks for no call now. Nor is anybody told as long as it waits for other pairs."""
    async with replicas(place, 2) as (first, second):
        one, _ = await first.ask(pairs([1]))
        other, _ = await first.ask(pairs([2]))
        await second.ask(pairs([1]))
        assert second.queue._look
        second.queue._look.cancel()
        second.queue._changed.clear()
        await second.messages()
        heard = second.listener._heard.number
        await first.close(one)
        await second.messages()
        assert second.listener._heard.number == heard
        one, _ = await first.ask(pairs([1]))
        await first.close(other)
        await first.close(one)
        await second.messages()
        await asyncio.wait_for(second.queue.changed(), 30)


async def test_while_calls_fail_who_joins_asks_for_one_at_once(place: Place) -> None:
    """The way to the model of whoever queued them may be what is broken, and that replica stands back."""
    async with replicas(place, 2) as (first, second):
        await first.ask(pairs([1]))
        await first.queue.fail(await first.take(), DOWN, retry_after_seconds=0)
        second.queue._changed.clear()
        await second.ask(pairs([1]))
        assert second.queue._changed.is_set()


async def test_whose_reply_is_lost_knows_the_pairs_for_its_own(place: Place) -> None:
    """Asked again, it joins what it has queued itself; so do the callers of one that died and came back."""
    async with replicas(place, 2) as (first, second):
        first.client.lose = 1
        await first.ask(pairs([1]))
        assert first.queue._changed.is_set()
        first.unheard()
        second.queue._changed.clear()
        await second.ask(pairs([1]))
        assert second.queue._changed.is_set()


async def test_a_long_question_asks_for_calls_meanwhile(place: Place) -> None:
    """As soon as it has queued a batch: others may have joined that."""
    async with replicas(place, 1) as (replica,):
        replica.queue._changed.clear()
        replica.client.slow = (0, 60)
        asking = asyncio.create_task(replica.ask(pairs(range(600))))
        await asyncio.wait_for(replica.queue.changed(), 20)
        assert not asking.done()
        replica.queue._changed.clear()
        asking.cancel()
        await asyncio.wait([asking])
        assert replica.queue._changed.is_set()  # what it sent may be queued all the same


async def test_an_error_that_cannot_be_read_is_counted_and_may_be_retried(place: Place) -> None:
    """In a message or a reply: the pair ends, so nobody waits for ever, and the metric tells."""
    async with replicas(place, 1) as (replica,):
        wait, _ = await replica.ask(pairs([1]))
        replica.queue.published(b"", [(pair(1).digest, [b"refused", b"no such code"])], None)
        [outcome] = wait.outcomes.values()
        assert isinstance(outcome, Unavailable)
        assert replica.metrics.store_garbage._value.get() == 1


@pytest.mark.parametrize("how", ["leave", "late answer"])
async def test_suspects_that_end_leave_no_group(how: str, place: Place) -> None:
    """A group of suspects goes with the last request that waits for one of them, and not before."""
    async with replicas(place) as (replica,):
        first, _ = await replica.ask(pairs([1, 2]))
        last, _ = await replica.ask(pairs([3]))
        await replica.queue.refuse(await replica.take(), REFUSED, {})
        assert "suspects" in place.left()
        if how == "leave":
            await replica.close(first)
            assert "suspects" in place.left()
            await replica.close(last)
        else:
            await replica.queue.publish({item.digest: 3 for item in pairs([1, 2])})
            assert "suspects" in place.left()
            await replica.queue.publish({pair(3).digest: 3})
        assert place.left() == {}


async def test_a_pause_of_another_target_gives_up_nobody(place: Place) -> None:
    """A replica's own target may take the pairs: only callers whose replica calls the same one are told."""
    async with replicas(place, 2) as (here, there):
        for model in (f"{place.keys.limit}:model:other", place.keys.model):
            there.scripts.model = there.scripts._keys[3] = model
            wait, _ = await here.ask([pair(1)], asker(patience=5))
            await there.ask([pair(1)])
            there.queue._not_before = 0.0
            await there.queue.fail(await there.take(), DOWN, retry_after_seconds=20)
            await here.messages()
            assert bool(wait.open) is (model != place.keys.model)


async def test_a_lost_pair_is_asked_again_until_the_latest_deadline(place: Place) -> None:
    """Redis was emptied: the caller who joined with more time is remembered here."""
    async with replicas(place, 1) as (replica,):
        for patience in (0.3, 60.0, 0.2):
            await replica.ask([pair(1)], asker(patience=patience))
        place.flush()
        await replica.beat()
        await replica.queue.ask_again()
        await asyncio.sleep(0.35)
        assert numbers_of(await replica.take()) == [1]
