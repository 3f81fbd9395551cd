"""Tests of racing events in the shared queue, and of a model that is down.

More than 250 lines: the events are the same few requests, cancellations and claims in other orders.
"""

import asyncio
import time

import pytest
from grpc import StatusCode

from services.cache_proxy.domain import Pair
from services.cache_proxy.errors import (
    InvalidModelResponseError,
    ModelUnavailableError,
    PairRejectedError,
    QueueFullError,
)
from services.cache_proxy.queue.interface import Claim
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
