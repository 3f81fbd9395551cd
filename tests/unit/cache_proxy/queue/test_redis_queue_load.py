"""Tests of the cost of many pairs and callers in the shared queue: script calls, their length, and memory."""

import asyncio
import time

import pytest

from services.cache_proxy.domain import Pair
from services.cache_proxy.queue.interface import Claim
from tests.support.replicas import (
    QueueLocation,
    numbered_pair,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)


@pytest.fixture
def place(shared_redis: str) -> QueueLocation:
    """Return a new deployment."""
    return QueueLocation.create(shared_redis)


def _interest(place: QueueLocation) -> int:
    with place.client() as client:
        return int(client.hlen(f"{place.keys.base}pairs"))


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
