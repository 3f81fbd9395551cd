"""Tests of racing events in the shared queue, of a model that is down, and of the cost of script calls."""

import asyncio
import time

import pytest
from grpc import StatusCode

from services.cache_proxy.cache.cache_scripts import ADD_TOMBSTONES
from services.cache_proxy.cache.invalidation import InvalidationFollower, InvalidationLog
from services.cache_proxy.domain import Pair
from services.cache_proxy.errors import (
    InvalidModelResponseError,
    ModelUnavailableError,
    PairRejectedError,
    QueueFullError,
)
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pair,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)

REFUSED = PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad")
DOWN = ModelUnavailableError("down", retry_after_seconds=1.0)


@pytest.fixture
def place(shared_redis: str) -> QueueLocation:
    """Return a new deployment."""
    return QueueLocation.create(shared_redis)


def _interest(place: QueueLocation) -> int:
    with place.client() as client:
        return int(client.hlen(f"{place.keys.base}pairs"))


async def test_cancel_racing_with_enqueue_keeps_new_waiter(place: QueueLocation) -> None:
    """One request is cancelled while another enqueues the same pairs."""
    async with replicas(place) as (replica,):
        for turn in range(20):
            numbers = range(turn * 700, turn * 700 + 700)
            wait, _ = await replica.enqueue(numbered_pairs(numbers))
            leaving = asyncio.create_task(replica.cancel(wait))
            await asyncio.sleep(0)
            again, _ = await replica.enqueue(numbered_pairs(numbers))
            await leaving
            assert _interest(place) == 700
            await replica.cancel(again)
            assert _interest(place) == 0
        assert place.leftover_keys() == {}


@pytest.mark.parametrize("slow", [(0.05,), (0.0, 0.05)])
async def test_slow_connection_keeps_order_of_cancel_and_enqueue(
    slow: tuple[float, ...], place: QueueLocation
) -> None:
    """The cancellation or the next enqueue takes long. The pair waits all the same."""
    async with replicas(place) as (replica,):
        wait, _ = await replica.enqueue([numbered_pair(1)])
        replica.client.delays = slow
        leaving = asyncio.create_task(replica.cancel(wait))
        await asyncio.sleep(0)
        await replica.enqueue([numbered_pair(1)])
        await leaving
        assert _interest(place) == 1


async def test_request_cancelled_during_slow_enqueue_leaves_no_interest(place: QueueLocation) -> None:
    """The cancellation follows the enqueue in Redis."""
    async with replicas(place) as (replica,):
        wait = replica.waiters.register([numbered_pair(1).digest])
        replica.client.delays = (0.05,)
        enqueueing = asyncio.create_task(replica.queue.enqueue([numbered_pair(1)], request_context()))
        await asyncio.sleep(0.01)
        enqueueing.cancel()
        await asyncio.gather(enqueueing, return_exceptions=True)
        await replica.cancel(wait)
        assert _interest(place) == 0


async def test_request_cancelled_at_any_time_of_enqueue_leaves_nothing(place: QueueLocation) -> None:
    """The request takes several script calls."""
    async with replicas(place) as (replica,):
        for delay in range(20):
            wanted = numbered_pairs(range(1300))
            wait = replica.waiters.register([item.digest for item in wanted])
            enqueueing = asyncio.create_task(replica.queue.enqueue(wanted, request_context()))
            await asyncio.sleep(delay * 0.002)
            enqueueing.cancel()
            await asyncio.gather(enqueueing, return_exceptions=True)
            await replica.cancel(wait)
            assert _interest(place) == 0
            assert replica.queue.interest.snapshot() == {}


async def test_rejected_request_does_not_cancel_pairs_of_others(place: QueueLocation) -> None:
    """A request that does not fit joined pairs of another one, which is still answered."""
    async with replicas(place, 1, queue_limits(batch_pairs=1000, max_pairs=1000)) as (replica,):
        wait, _ = await replica.enqueue(numbered_pairs(range(500)))
        with pytest.raises(QueueFullError):
            await replica.enqueue(numbered_pairs(range(1200)))
        assert replica.queue.interest.snapshot().keys() == {
            item.digest for item in numbered_pairs(range(500))
        }
        assert _interest(place) == 500
        claim = await replica.claim_batch()
        await replica.queue.complete(claim, {item.digest: 2 for item in claim.pairs})
        assert not wait.pending
        assert place.leftover_keys() == {}


async def test_concurrent_requests_do_not_share_a_rejection(place: QueueLocation) -> None:
    """Of two requests for a pair, the one with a short deadline is rejected, and the other waits."""
    bounds = queue_limits(batch_pairs=1, calls_per_second=0.2)
    async with replicas(place, 1, bounds) as (replica,):
        await replica.enqueue(numbered_pairs(range(3)))
        hasty = asyncio.create_task(replica.enqueue([numbered_pair(9)], request_context("a", timeout=0.5)))
        patient = asyncio.create_task(replica.enqueue([numbered_pair(9)], request_context("b", timeout=500)))
        with pytest.raises(QueueFullError):
            await hasty
        wait, _ = await patient
        assert numbered_pair(9).digest in replica.queue.interest.snapshot()
        await replica.queue.claims.publish({numbered_pair(9).digest: 5})
        await replica.receive_messages()
        assert list(wait.outcomes.values()) == [5]


async def test_answer_of_expired_claim_ends_both_claims(place: QueueLocation) -> None:
    """Another replica has claimed the pairs again. The first answer ends them."""
    async with replicas(place, 2) as (slow, other):
        await slow.enqueue(numbered_pairs([1, 2]))
        await other.enqueue(numbered_pairs([1, 2]))
        first = await slow.claim_batch()
        place.age_claims(60_000)
        second = await other.claim_batch()
        await slow.queue.complete(first, {item.digest: 3 for item in first.pairs})
        await other.receive_messages()
        assert sorted(level for _, level in other.resolved) == [3, 3]  # type: ignore[type-var]
        await other.queue.reject(second, REFUSED, {})
        assert other.queue.claims.ids == []
        assert place.leftover_keys() == {}
        assert (await other.enqueue(numbered_pairs([1])))[1].outcomes == {numbered_pair(1).digest: 3}


async def test_invalid_response_completed_twice_counts_once(place: QueueLocation) -> None:
    """The reply was lost, so the script ran again. The pair is inferred once more, as after one response."""
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs([1]))
        claim = await replica.claim_batch()
        replica.client.lost_replies = 1
        await replica.queue.complete(claim, {numbered_pair(1).digest: InvalidModelResponseError("none")})
        assert (await replica.enqueue(numbered_pairs([1])))[1].queued
        await replica.queue.complete(
            await replica.claim_batch(), {numbered_pair(1).digest: InvalidModelResponseError("none")}
        )
        assert not (await replica.enqueue(numbered_pairs([1])))[1].queued


async def test_rejection_reaches_request_that_joined_on_another_replica(place: QueueLocation) -> None:
    """Later requests for the pair get the rejection, too."""
    async with replicas(place, 2) as (one, other):
        await one.enqueue(numbered_pairs([1]))
        claim = await one.claim_batch()
        wait, _ = await other.enqueue(numbered_pairs([1]))
        await one.queue.reject(claim, REFUSED, {})
        await other.receive_messages()
        assert [type(outcome) for outcome in wait.outcomes.values()] == [PairRejectedError]
        _, again = await other.enqueue(numbered_pairs([1]))
        assert [type(outcome) for outcome in again.outcomes.values()] == [PairRejectedError]


async def _is_refused(replica: Replica, wanted: list[Pair]) -> bool:
    try:
        await replica.enqueue(wanted)
    except ModelUnavailableError:
        return True
    return False


async def test_model_down_ends_waiting_pairs_of_all_replicas(place: QueueLocation) -> None:
    """After the retry window nothing stays queued, and new requests are rejected at once."""
    async with replicas(place, 2, queue_limits(retry_window_seconds=0.3)) as (one, other):
        await one.enqueue(numbered_pairs(range(50)))
        wait, _ = await other.enqueue(numbered_pairs(range(30, 60)))
        while wait.pending:
            one.queue.claims.deferral.not_before = 0
            claim = await one.claim_batch()
            await asyncio.sleep(claim.send_at - time.monotonic())
            await one.queue.fail(claim, DOWN)
            await other.receive_messages()
        assert {type(outcome) for outcome in wait.outcomes.values()} == {ModelUnavailableError}
        assert not wait.pending
        assert place.leftover_keys() == {}
        while await _is_refused(other, [numbered_pair(100)]):  # noqa: ASYNC110 - a backoff has no event
            await asyncio.sleep(0.05)
        await other.queue.fail(await other.claim_batch(), DOWN, retry_after_seconds=5)
        assert await _is_refused(one, [numbered_pair(101)])
        assert place.leftover_keys() == {}


async def test_pair_in_a_call_while_model_is_down_may_be_answered(
    place: QueueLocation,
) -> None:
    """It stays in its claim, so it is not sent again, and its answer counts."""
    async with replicas(place, 2, queue_limits(retry_window_seconds=0.3)) as (one, other):
        await one.enqueue(numbered_pairs([1]))
        flying = await one.claim_batch()
        wait, _ = await other.enqueue(numbered_pairs([2]))
        while wait.pending:
            other.queue.claims.deferral.not_before = 0
            claim = await other.claim_batch()
            await asyncio.sleep(claim.send_at - time.monotonic())
            await other.queue.fail(claim, DOWN)
            await other.receive_messages()
        await other.enqueue(numbered_pairs([1]))
        assert not isinstance(await other.queue.claim(), Claim)
        await one.queue.complete(flying, {numbered_pair(1).digest: 6})
        await other.receive_messages()
        assert (numbered_pair(1).digest, 6) in other.resolved
        assert place.leftover_keys() == {}


async def test_replica_with_failed_call_leaves_next_slot_to_another(
    place: QueueLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits a little longer than its backoff, and a replica with no waiting pairs is woken."""
    # This is longer than a slow test takes.
    monkeypatch.setattr("services.cache_proxy.queue.call_deferral._CLAIM_DELAY_AFTER_FAILURE_SECONDS", 60)
    async with replicas(place, 2) as (broken, sound):
        await broken.enqueue(numbered_pairs([1]))
        await sound.enqueue(numbered_pairs([1]))
        claim = await broken.claim_batch()
        await sound.receive_messages()
        sound.queue._changed.clear()
        assert not isinstance(await sound.queue.claim(), Claim)
        await broken.queue.fail(claim, DOWN, retry_after_seconds=0)
        await sound.receive_messages()
        await asyncio.wait_for(sound.queue.wait_for_change(), 30)
        assert isinstance(await broken.queue.claim(), ClaimDeferred)
        assert pair_numbers(await sound.claim_batch()) == [1]


async def test_assisting_replica_claims_when_next_slot_is_far_away(
    place: QueueLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It claims for another replica whose call failed."""
    monkeypatch.setattr("services.cache_proxy.queue.claims._ASSIST_SECONDS", 0.05)
    monkeypatch.setattr("services.cache_proxy.queue.call_deferral._CLAIM_DELAY_AFTER_FAILURE_SECONDS", 60)
    async with replicas(place, 2, queue_limits(calls_per_second=3)) as (broken, sound):
        await broken.enqueue(numbered_pairs([1]))
        claim = await broken.claim_batch()
        await broken.queue.fail(claim, DOWN)
        await sound.receive_messages()
        assert pair_numbers(await sound.claim_batch()) == [1]


async def test_replica_with_failed_call_leaves_slot_of_slow_limit_to_others(
    place: QueueLocation,
) -> None:
    """Its backoff may end before the limit allows a call. It waits until another could have taken that."""
    bounds = queue_limits(calls_per_second=0.01)
    async with replicas(place, 1, bounds) as (broken,):
        await broken.enqueue(numbered_pairs([1]))
        with place.client() as client:
            client.hset(
                place.keys.limit,
                mapping={"pairs_tat": 0, "calls_tat": 0, "run": broken.queue.claims.server_run_id},
            )
        claim = await broken.claim_batch()
        await broken.queue.fail(claim, DOWN)
        decision = await broken.queue.claim()
        assert isinstance(decision, ClaimDeferred)
        assert decision.wait_seconds > bounds.slot_seconds


async def test_many_caller_names_take_bounded_memory(place: QueueLocation) -> None:
    """Callers choose their names. Beyond a thousand they share one turn, and no pair is lost."""
    async with replicas(place, 1, queue_limits(batch_pairs=500)) as (replica,):
        await asyncio.gather(
            *(
                replica.enqueue([numbered_pair(number)], request_context(f"n{number}"))
                for number in range(3000)
            )
        )
        with place.client() as client:
            assert client.hlen(f"{place.keys.base}fair:interactive") <= 1600
        seen: list[int] = []
        while isinstance(claim := await replica.queue.claim(), Claim):
            seen += pair_numbers(claim)
            await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        assert sorted(seen) == list(range(3000))


async def test_re_enqueue_of_many_callers_shares_script_calls(place: QueueLocation) -> None:
    """A thousand callers with a pair each take a few calls."""
    async with replicas(place, 1, queue_limits(batch_pairs=1000)) as (replica,):
        await asyncio.gather(
            *(
                replica.enqueue([numbered_pair(number)], request_context(f"n{number}"))
                for number in range(1000)
            )
        )
        with place.client() as client:

            def calls() -> int:
                return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])

            client.delete(f"{place.keys.base}pairs", f"{place.keys.base}lane:interactive")
            before = calls()
            await replica.queue.re_enqueue()
            assert calls() - before <= 5
        assert len(pair_numbers(await replica.claim_batch())) == 1000


async def test_long_texts_are_split_into_small_calls(place: QueueLocation) -> None:
    """For one request or many, enqueued or enqueued again."""
    wanted = [Pair(item.digest, item.company + "c" * 4000, "t" * 4000) for item in numbered_pairs(range(700))]
    async with replicas(place, 1, queue_limits(batch_pairs=1000, batch_bytes=10**7)) as (replica,):
        replica.client.max_command_bytes = 800_000
        some = [wanted[at : at + 20] for at in range(300, 700, 20)]
        await asyncio.gather(*map(replica.enqueue, [wanted[:300], *some]))
        place.flush()
        await replica.queue.re_enqueue()
        assert _interest(place) == 700


async def test_expired_pairs_are_removed_in_parts(place: QueueLocation) -> None:
    """A replica died with 10000 waiting pairs. No script examines all of them."""
    async with replicas(place, 2, queue_limits(batch_pairs=1000)) as (dead, other):
        patience = 1.5
        await dead.enqueue(numbered_pairs(range(10_000)), request_context(timeout=patience))
        until = time.monotonic() + patience
        await dead.crash()
        await other.enqueue([numbered_pair(10**6)], request_context("late", "bulk"))
        await asyncio.sleep(until - time.monotonic() + 0.01)
        left = [_interest(place)]
        while not isinstance(claim := await other.queue.claim(), Claim):
            left.append(_interest(place))
            assert left[-2] - left[-1] <= 3500
        assert pair_numbers(claim) == [10**6]
        await other.queue.complete(claim, {numbered_pair(10**6).digest: 1})
        for turn in range(10):
            await other.enqueue([numbered_pair(10**6 + 1 + turn)])
            claim = await other.claim_batch()
            await other.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        assert place.leftover_keys() == {}


async def test_thousand_pairs_take_six_commands_and_do_not_block_redis(place: QueueLocation) -> None:
    """Two commands enqueue, one claims and two complete."""
    async with replicas(place, 1, queue_limits(batch_pairs=1000)) as (replica,):
        with place.client() as client:
            # CPU time of the server, which does not depend on other load of the machine.
            def busy_seconds() -> float:
                found = client.info("cpu")
                return float(found["used_cpu_user"] + found["used_cpu_sys"])

            before, busy_before = 0, 0.0
            for warm in (range(5000, 5010), range(1000)):
                before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
                busy_before = busy_seconds()
                await replica.enqueue(numbered_pairs(warm, text="some title of a job"))
                claim = await replica.claim_batch()
                await replica.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
            assert busy_seconds() - busy_before < 0.3
            assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before <= 6


@pytest.mark.parametrize("all_of_them", [False, True])
async def test_answer_invalidated_in_a_call_is_not_remembered(shared_redis: str, all_of_them: bool) -> None:
    """Its waiters get it, and later requests infer the pair again. Other answers are remembered."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (one,):
        await one.enqueue(numbered_pairs([0]))
        await one.queue.complete(before := await one.claim_batch(), {pair.digest: 5 for pair in before.pairs})
        wait, _ = await one.enqueue(numbered_pairs([1, 2]))
        claim = await one.claim_batch()
        with place.client() as client:
            buried = b"" if all_of_them else numbered_pairs([1])[0].digest
            client.eval(ADD_TOMBSTONES.text, 1, f"{place.keys.base}tombs", buried)
        await one.queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        assert set(wait.outcomes.values()) == {3}
        _, again = await one.enqueue(numbered_pairs([1, 2]))
        known = [] if all_of_them else [numbered_pairs([2])[0].digest]
        assert list(again.outcomes) == known
        await one.claim_batch()


async def test_answer_invalidated_in_a_call_is_logged_as_its_pair_ends(shared_redis: str) -> None:
    """The claiming replica may crash before it stores the answer. Other caches that took it still drop it."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (one,):
        reached = backend_for(create_client(shared_redis, timeout_seconds=5))
        forgotten: list[bytes] = []
        follower = InvalidationFollower(
            InvalidationLog(reached, place.keys.invalidation_log), remove=forgotten.append, clear=lambda: None
        )
        await follower.poll()
        await one.enqueue(numbered_pairs([1, 2]))
        claim = await one.claim_batch()
        with place.client() as client:
            client.eval(ADD_TOMBSTONES.text, 1, f"{place.keys.base}tombs", numbered_pair(1).digest)
        # The pair is in a call from before the invalidation.
        await one.enqueue(numbered_pairs([1]))
        await one.queue.complete(claim, {item.digest: 3 for item in claim.pairs})
        await follower.poll()
        assert forgotten == [numbered_pair(1).digest]
        await reached.close()


async def test_late_answer_of_invalidated_pair_is_not_remembered(shared_redis: str) -> None:
    """After the claim has ended its start is unknown, so any tombstone counts."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (one,):
        await one.enqueue(numbered_pairs([1, 2]))
        claim = await one.claim_batch()
        await one.queue.release(claim)
        with place.client() as client:
            client.eval(ADD_TOMBSTONES.text, 1, f"{place.keys.base}tombs", numbered_pairs([1])[0].digest)
        await one.queue.complete(claim, {pair.digest: 3 for pair in claim.pairs})
        _, again = await one.enqueue(numbered_pairs([1, 2]))
        assert list(again.outcomes) == [numbered_pairs([2])[0].digest]


async def test_joining_replica_leaves_next_claim_to_queueing_replica(place: QueueLocation) -> None:
    """It claims later, since the other replica may be gone."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1, 2]))
        assert first.queue._changed._event.is_set()
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1, 2]))
        await second.enqueue(numbered_pairs([2]))
        assert not second.queue._changed._event.is_set()
        await asyncio.wait_for(second.queue.wait_for_change(), 30)
        await second.enqueue(numbered_pairs([2, 3]))
        assert second.queue._changed._event.is_set()


@pytest.mark.parametrize(("before", "now"), [("bulk", "interactive"), ("refresh", "bulk")])
async def test_replica_that_joins_with_better_priority_claims_at_once(
    before: str, now: str, place: QueueLocation
) -> None:
    """The time of the next call may have changed, which the other replica does not know."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1]), request_context(priority=before))
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1]), request_context(priority=now))
        assert second.queue._changed._event.is_set()


async def test_answer_wakes_only_replica_with_waiting_pairs(place: QueueLocation) -> None:
    """Of two replicas whose pair is answered, one waits for other pairs, too."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1, 2]))
        claim = await first.claim_batch()
        await second.enqueue(numbered_pairs([1]))
        await first.enqueue(numbered_pairs([3]))
        for replica in (first, second):
            replica.queue._changed.clear()
        await first.queue.complete(claim, {item.digest: 1 for item in claim.pairs})
        await second.receive_messages()
        await first.receive_messages()
        await asyncio.wait_for(first.queue.wait_for_change(), 30)
        assert not second.queue._changed._event.is_set()


async def test_joining_replica_is_woken_when_queueing_replica_has_no_pairs_left(
    place: QueueLocation,
) -> None:
    """The other replica claims nothing from then on. Nothing is published while it waits for other pairs."""
    async with replicas(place, 2) as (first, second):
        one, _ = await first.enqueue(numbered_pairs([1]))
        other, _ = await first.enqueue(numbered_pairs([2]))
        await second.enqueue(numbered_pairs([1]))
        assert second.queue._changed._timer
        second.queue._changed._timer.cancel()
        second.queue._changed.clear()
        await second.receive_messages()
        sequence = second.session.subscription.sequence
        await first.cancel(one)
        await second.receive_messages()
        assert second.session.subscription.sequence == sequence
        one, _ = await first.enqueue(numbered_pairs([1]))
        await first.cancel(other)
        await first.cancel(one)
        await second.receive_messages()
        await asyncio.wait_for(second.queue.wait_for_change(), 30)


async def test_joining_replica_claims_at_once_while_calls_fail(place: QueueLocation) -> None:
    """The replica that queued the pair may be the one that cannot reach the model."""
    async with replicas(place, 2) as (first, second):
        await first.enqueue(numbered_pairs([1]))
        await first.queue.fail(await first.claim_batch(), DOWN, retry_after_seconds=0)
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1]))
        assert second.queue._changed._event.is_set()


async def test_repeated_enqueue_after_lost_reply_counts_pairs_as_own(place: QueueLocation) -> None:
    """A replica whose reply was lost joins what it has queued.

    Pairs of a dead replica are claimed by those that join.
    """
    async with replicas(place, 2) as (first, second):
        first.client.lost_replies = 1
        await first.enqueue(numbered_pairs([1]))
        assert first.queue._changed._event.is_set()
        first.expire_heartbeat()
        second.queue._changed.clear()
        await second.enqueue(numbered_pairs([1]))
        assert second.queue._changed._event.is_set()


async def test_long_enqueue_wakes_dispatcher_after_first_batch(place: QueueLocation) -> None:
    """Other replicas may have joined the batch, and leave the claim to this one."""
    async with replicas(place, 1) as (replica,):
        replica.queue._changed.clear()
        replica.client.delays = (0, 60)
        enqueueing = asyncio.create_task(replica.enqueue(numbered_pairs(range(600))))
        await asyncio.wait_for(replica.queue.wait_for_change(), 20)
        assert not enqueueing.done()
        replica.queue._changed.clear()
        enqueueing.cancel()
        await asyncio.wait([enqueueing])
        # The pairs that it sent may have been queued.
        assert replica.queue._changed._event.is_set()


async def test_unreadable_error_is_counted_and_retryable(place: QueueLocation) -> None:
    """In a message or a reply, the pair ends, so no request waits forever."""
    async with replicas(place, 1) as (replica,):
        wait, _ = await replica.enqueue(numbered_pairs([1]))
        replica.queue.apply_outcomes(b"", [(numbered_pair(1).digest, [b"refused", b"no such code"])], None)
        [outcome] = wait.outcomes.values()
        assert isinstance(outcome, ModelUnavailableError)
        assert replica.metrics.store_garbage._value.get() == 1


@pytest.mark.parametrize("how", ["leave", "late answer"])
async def test_suspects_that_end_leave_no_group(how: str, place: QueueLocation) -> None:
    """A group of suspects is removed with the last request that waits for one of them."""
    async with replicas(place) as (replica,):
        first, _ = await replica.enqueue(numbered_pairs([1, 2]))
        last, _ = await replica.enqueue(numbered_pairs([3]))
        await replica.queue.reject(await replica.claim_batch(), REFUSED, {})
        assert "suspects" in place.leftover_keys()
        if how == "leave":
            await replica.cancel(first)
            assert "suspects" in place.leftover_keys()
            await replica.cancel(last)
        else:
            await replica.queue.claims.publish({item.digest: 3 for item in numbered_pairs([1, 2])})
            assert "suspects" in place.leftover_keys()
            await replica.queue.claims.publish({numbered_pair(3).digest: 3})
        assert place.leftover_keys() == {}


async def test_backoff_of_another_model_target_fails_no_request(place: QueueLocation) -> None:
    """A replica with another target may send the pairs itself."""
    async with replicas(place, 2) as (here, there):
        for model in (f"{place.keys.limit}:model:other", place.keys.model):
            there.scripts.model_key = there.scripts._keys[3] = model
            wait, _ = await here.enqueue([numbered_pair(1)], request_context(timeout=5))
            await there.enqueue([numbered_pair(1)])
            there.queue.claims.deferral.not_before = 0.0
            await there.queue.fail(await there.claim_batch(), DOWN, retry_after_seconds=20)
            await here.receive_messages()
            assert bool(wait.pending) is (model != place.keys.model)


async def test_lost_pair_is_re_enqueued_until_latest_deadline(place: QueueLocation) -> None:
    """Redis was emptied. The request that joined with more time is remembered here."""
    async with replicas(place, 1) as (replica,):
        for patience in (0.3, 60.0, 0.2):
            await replica.enqueue([numbered_pair(1)], request_context(timeout=patience))
        place.flush()
        await replica.heartbeat()
        await replica.queue.re_enqueue()
        await asyncio.sleep(0.35)
        assert pair_numbers(await replica.claim_batch()) == [1]
