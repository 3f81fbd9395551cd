"""Tests of quotas that all replicas of one Redis keep together."""

import asyncio
import math
from dataclasses import dataclass

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache_proxy.domain import PACE
from services.cache_proxy.errors import QuotaExceededError
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.cache_proxy.queue.quotas import DEFAULT_ACCOUNT, Quota, Quotas, no_quotas
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pair,
    numbered_pairs,
    queue_limits,
    replicas,
    request_context,
)

BOUNDS = queue_limits(batch_pairs=100)
HOUR_MS = 3_600_000
# For a deployment without a limit of calls; see `claim.lua`.
BURST_MS, LEAD_MS, PAIRS_A_MS = 1000, 15, 50


async def _start_quotas(place: QueueLocation, replica: Replica) -> None:
    """Claim once and age the quotas: the first claim on a server takes all quotas for spent."""
    await replica.enqueue(numbered_pairs([10**9]), request_context(priority="refresh"))
    await replica.queue.complete(await replica.claim_batch(), {numbered_pair(10**9).digest: 1})
    place.age_quotas(HOUR_MS)


async def _send_all(replica: Replica) -> int:
    decision = await replica.queue.claim()
    if isinstance(decision, ClaimDeferred):
        return 0
    await replica.queue.complete(decision, {item.digest: 1 for item in decision.pairs})
    return len(decision.pairs)


@pytest.fixture
def held() -> Quotas:
    """Return quotas for the caller `c`."""
    return Quotas({"c": Quota("c", pairs_per_second=10, queued_pairs=100)})


async def test_replicas_share_one_quota(held: Quotas, shared_redis: str) -> None:
    """Pairs that one replica queued or sent count for the other."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, BOUNDS, lambda: held) as (one, other):
        await _start_quotas(place, one)
        await one.enqueue(numbered_pairs(range(60)))
        with pytest.raises(QuotaExceededError):
            await other.enqueue(numbered_pairs(range(100, 141)))
        await other.enqueue(numbered_pairs(range(100, 140)))
        assert await _send_all(one) + await _send_all(other) in {9, 10}
        assert await _send_all(one) + await _send_all(other) == 0


async def test_server_without_history_takes_quotas_for_spent(held: Quotas, shared_redis: str) -> None:
    """After a flush, or on a server that took over, all may just have been spent."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, BOUNDS, lambda: held) as (replica,):
        await _start_quotas(place, replica)
        await replica.enqueue(numbered_pairs(range(50)))
        place.flush()
        await replica.heartbeat()
        await replica.queue.re_enqueue()
        assert await _send_all(replica) == 0
        with place.client() as client:
            client.hset(place.keys.limit, "run", "another")
        place.age_quotas(HOUR_MS)
        assert await _send_all(replica) == 0


async def test_silent_replica_is_left_its_share_of_quotas(held: Quotas, shared_redis: str) -> None:
    """Of two replicas, the one that may have lost Redis is left half of every quota."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, BOUNDS, lambda: held) as (one, other):
        await _start_quotas(place, one)
        await one.heartbeat()
        other.expire_heartbeat()
        await one.enqueue(numbered_pairs(range(50)))
        assert await _send_all(one) == 4


async def test_replica_without_quota_file_claims_pairs_with_quotas(held: Quotas, shared_redis: str) -> None:
    """The quota that applies is that of the replica that enqueued a pair."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, BOUNDS, lambda: held) as (one, other):
        other.queue.interest._quotas = no_quotas
        await _start_quotas(place, one)
        await one.enqueue(numbered_pairs(range(50)))
        await other.enqueue(numbered_pairs(range(100, 105)))
        assert await _send_all(other) in {9 + 5, 10 + 5}


async def test_quotas_leave_no_keys_behind(shared_redis: str) -> None:
    """With callers in the file and others, Redis holds none of their lanes after all pairs are sent."""
    quotas = Quotas(
        {f"n{number}": Quota(f"n{number}", 1e6) for number in range(50)}, Quota(DEFAULT_ACCOUNT, 1e6)
    )
    place = QueueLocation.create(shared_redis)
    async with replicas(place, bounds=queue_limits(batch_pairs=1000), quotas=lambda: quotas) as (replica,):
        await _start_quotas(place, replica)
        requests = [
            replica.enqueue(numbered_pairs([number]), request_context(f"n{number}")) for number in range(300)
        ]
        await asyncio.gather(*requests)
        assert await _send_all(replica) == 300
        with place.client() as client:
            keys = [key.decode() for key in client.scan_iter(f"{place.keys.base}*".replace("{", "[{]"))]
            assert client.hlen(f"{place.keys.base}quotas") == 51
            assert client.zcard(f"{place.keys.limit}:spent") == 51
            # The account was last seen long ago.
            client.hset(f"{place.keys.base}quotas", "n1", "5:0")
        assert not [key for key in keys if "lane:" in key or "fair:" in key]
        await replica.enqueue(numbered_pairs([500]), request_context("n2"))
        await _send_all(replica)
        with place.client() as client:
            assert client.hlen(f"{place.keys.base}quotas") == 50


@dataclass
class _QuotaModel:
    """GCRA in Python. The time of a claim is known within some ms, so `least` and `most` bound its state."""

    # Pairs a ms.
    rate: float
    least: float = 0.0
    most: float = 0.0

    def allows(self, at: float, until: float) -> int:
        """Return how many pairs may be sent, if the quota is spent until then."""
        burst = max(BURST_MS, 1 / self.rate)
        return max(0, math.floor((at + burst - max(until, at)) * self.rate + 1e-6))

    def spend(self, count: int, before: float, after: float) -> None:
        """Record pairs that were sent between these times."""
        lead = max(LEAD_MS, LEAD_MS + count / PAIRS_A_MS)
        self.least = max(self.least, before + lead) + count / self.rate
        self.most = max(self.most, after + lead) + count / self.rate

    def age(self, ms: int) -> None:
        """Let time pass."""
        self.least, self.most = self.least - ms, self.most - ms


def _now_ms(client: "redis.Redis") -> float:
    seconds, microseconds = client.time()
    return float(seconds * 1000 + microseconds // 1000)


@pytest.mark.slow
@settings(max_examples=10)
@given(
    pairs_per_second=st.sampled_from([0.3, 7.0, 100.0]),
    steps=st.lists(st.tuples(st.integers(0, 4000), st.booleans()), min_size=1, max_size=8),
)
def test_script_matches_gcra_model(
    pairs_per_second: float, steps: list[tuple[int, bool]], shared_redis: str
) -> None:
    """Whatever the pauses, and whether batches are sent or released."""

    async def run() -> None:
        place = QueueLocation.create(shared_redis)
        quotas = Quotas({"c": Quota("c", pairs_per_second)})
        bounds = queue_limits(batch_pairs=1000)
        async with replicas(place, bounds=bounds, quotas=lambda: quotas) as (replica,):
            await _start_quotas(place, replica)
            model = _QuotaModel(pairs_per_second * PACE / 1000)
            await replica.enqueue(numbered_pairs(range(800)), request_context("c", timeout=80_000))
            with place.client() as client:
                for pause_ms, put_back in steps:
                    place.age_quotas(pause_ms)
                    model.age(pause_ms)
                    before = _now_ms(client)
                    decision = await replica.queue.claim()
                    after = _now_ms(client)
                    count = len(decision.pairs) if isinstance(decision, Claim) else 0
                    least = model.allows(before + LEAD_MS, model.most)
                    most = model.allows(after + LEAD_MS, model.least)
                    assert least <= count <= most
                    if isinstance(decision, Claim) and put_back:
                        await replica.queue.release(decision)
                    elif isinstance(decision, Claim):
                        await replica.queue.complete(decision, {item.digest: 1 for item in decision.pairs})
                        model.spend(count, before, after)

    asyncio.run(run())
