"""Quotas that all replicas on a Redis keep together."""

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
BURST_MS, LEAD_MS, PAIRS_A_MS = 1000, 15, 50  # where nothing limits calls; see `claim.lua`


async def _start_quotas(place: QueueLocation, replica: Replica) -> None:
    """The first claim on a server takes all quotas for spent: let that be long ago."""
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
    """Of a caller `c`."""
    return Quotas({"c": Quota("c", pairs_per_second=10, queued_pairs=100)})


async def test_replicas_keep_one_quota_together(held: Quotas, shared_redis: str) -> None:
    """In the queue and to the model: what one has let in or sent, the other counts."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, BOUNDS, lambda: held) as (one, other):
        await _start_quotas(place, one)
        await one.enqueue(numbered_pairs(range(60)))
        with pytest.raises(QuotaExceededError):
            await other.enqueue(numbered_pairs(range(100, 141)))
        await other.enqueue(numbered_pairs(range(100, 140)))
        assert await _send_all(one) + await _send_all(other) in {9, 10}
        assert await _send_all(one) + await _send_all(other) == 0


async def test_a_server_that_forgot_gives_nothing_away(held: Quotas, shared_redis: str) -> None:
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


async def test_who_may_have_lost_redis_has_its_part(held: Quotas, shared_redis: str) -> None:
    """Of two replicas the silent one is left half of every quota."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, BOUNDS, lambda: held) as (one, other):
        await _start_quotas(place, one)
        await one.heartbeat()
        other.expire_heartbeat()
        await one.enqueue(numbered_pairs(range(50)))
        assert await _send_all(one) == 4


async def test_a_replica_without_the_file_sends_what_others_let_in(held: Quotas, shared_redis: str) -> None:
    """As their file has it: a quota is kept by whoever was asked."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, BOUNDS, lambda: held) as (one, other):
        other.queue.interest._quotas = no_quotas
        await _start_quotas(place, one)
        await one.enqueue(numbered_pairs(range(50)))
        await other.enqueue(numbered_pairs(range(100, 105)))
        assert await _send_all(other) in {9 + 5, 10 + 5}


async def test_quotas_leave_nothing_behind(shared_redis: str) -> None:
    """Names that nobody has, fifty that the file has: when all is sent, Redis holds no lane of theirs."""
    quotas = Quotas(
        {f"n{number}": Quota(f"n{number}", 1e6) for number in range(50)}, Quota(DEFAULT_ACCOUNT, 1e6)
    )
    place = QueueLocation.create(shared_redis)
    async with replicas(place, bounds=queue_limits(batch_pairs=1000), quotas=lambda: quotas) as (replica,):
        await _start_quotas(place, replica)
        asks = [
            replica.enqueue(numbered_pairs([number]), request_context(f"n{number}")) for number in range(300)
        ]
        await asyncio.gather(*asks)
        assert await _send_all(replica) == 300
        with place.client() as client:
            keys = [key.decode() for key in client.scan_iter(f"{place.keys.base}*".replace("{", "[{]"))]
            assert client.hlen(f"{place.keys.base}quotas") == 51
            assert client.zcard(f"{place.keys.limit}:spent") == 51
            client.hset(f"{place.keys.base}quotas", "n1", "5:0")  # last seen long ago
        assert not [key for key in keys if "lane:" in key or "fair:" in key]
        await replica.enqueue(numbered_pairs([500]), request_context("n2"))
        await _send_all(replica)
        with place.client() as client:
            assert client.hlen(f"{place.keys.base}quotas") == 50


@dataclass
class _QuotaModel:
    """A GCRA in Python. A claim's moment is known within some ms, so `least` and `most` bound its state."""

    rate: float  # pairs a ms
    least: float = 0.0
    most: float = 0.0

    def allows(self, at: float, until: float) -> int:
        """So many, if it was spent until then."""
        burst = max(BURST_MS, 1 / self.rate)
        return max(0, math.floor((at + burst - max(until, at)) * self.rate + 1e-6))

    def spend(self, count: int, before: float, after: float) -> None:
        """They went out between these moments."""
        lead = max(LEAD_MS, LEAD_MS + count / PAIRS_A_MS)
        self.least = max(self.least, before + lead) + count / self.rate
        self.most = max(self.most, after + lead) + count / self.rate

    def age(self, ms: int) -> None:
        """Time passes."""
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
def test_the_script_is_the_gcra_that_it_is_thought_to_be(
    pairs_per_second: float, steps: list[tuple[int, bool]], shared_redis: str
) -> None:
    """Whatever the pauses, sent or put back: as many pairs go as a GCRA in Python allows."""

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
