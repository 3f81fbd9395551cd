"""Tests of invalid limits, members and peer states in Redis."""

import pytest

from services.cache_proxy.queue.interface import ClaimDeferred
from tests.support.replicas import (
    QueueLocation,
    numbered_pairs,
    queue_limits,
    replicas,
)

# They start and stop real servers, and run many examples.
pytestmark = pytest.mark.slow

JUNK_NUMBERS = [b"", b"garbage", b"\xff\x00", b"nan", b"inf", b"-inf", b"-1", b"9" * 400, b"1e308", b"1e12"]


@pytest.mark.parametrize("junk", JUNK_NUMBERS)
async def test_unreadable_limit_is_replaced_by_settings(
    junk: bytes, shared_redis: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The next heartbeat replaces, counts and logs it once. A replica without Redis keeps the limit."""
    place, bounds = QueueLocation.create(shared_redis), queue_limits(calls_per_second=2, pairs_per_second=8)
    async with replicas(place, 1, bounds) as (replica,):
        with place.client() as client:
            names = [
                "pairs_per_second",
                "calls_per_second",
                "batch_pairs",
                "pairs_tat",
                "calls_tat",
                "not_before",
            ]
            client.hset(place.keys.limit, mapping=dict.fromkeys(names, junk))
            before = replica.metrics.store_garbage._value.get()
            caplog.clear()
            for _ in range(3):
                await replica.heartbeat()
            stored = client.hmget(place.keys.limit, names[:3])
        assert [float(value or "nan") for value in stored] == [8 * 0.98, 2 * 0.98, 4]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "calls_per_second" in caplog.records[0].message
        assert replica.metrics.store_garbage._value.get() > before
        assert replica.failover._limiter.slot_seconds > 0.5
        await replica.enqueue(numbered_pairs([1]))
        # The whole limit may just have been used.
        assert isinstance(await replica.queue.claim(), ClaimDeferred)


@pytest.mark.parametrize("junk", JUNK_NUMBERS)
async def test_unreadable_limit_leaves_slots_of_silent_replica_free(junk: bytes, shared_redis: str) -> None:
    """Until a heartbeat has replaced it, claims use the replica's own settings."""
    place, bounds = QueueLocation.create(shared_redis), queue_limits(calls_per_second=1e-6)
    async with replicas(place, 2, bounds) as (one, other):
        await one.enqueue(numbered_pairs([1]))
        # The first claim records the server.
        await one.queue.claim()
        other.expire_heartbeat()
        with place.client() as client:
            client.hset(place.keys.limit, "calls_per_second", junk)
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
        assert isinstance(await one.queue.claim(), ClaimDeferred)


@pytest.mark.parametrize(
    ("name", "score"),
    [(b"\xff,\x00", 0.0), (b"x,y,z", None), (b"ab" * 500, None), (b"abcd", 1e300), (b"abcd", float("inf"))],
)
async def test_invalid_replica_entry_has_no_share(
    name: bytes, score: float | None, shared_redis: str
) -> None:
    """It has no share of the limit and no slots, if its name or its heartbeat's time is not possible."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, queue_limits(calls_per_second=2)) as (replica,):
        with place.client() as client:
            now_ms = client.time()[0] * 1000
            client.zadd(f"{place.keys.limit}:replicas", {name: now_ms if score is None else score})
            client.hset(f"{place.keys.limit}:paused", name, b"1e15")
            await replica.heartbeat()
            assert client.zrange(f"{place.keys.limit}:replicas", 0, -1) == [replica.name.encode()]
            assert client.hlen(f"{place.keys.limit}:paused") == 0
        assert replica.failover._limiter.replicas == 1


async def test_peer_state_with_distant_expiry_is_ignored(shared_redis: str) -> None:
    """The replica may have lost Redis and use its own slots, so they are left free."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2, queue_limits(calls_per_second=1e-6)) as (one, other):
        await one.enqueue(numbered_pairs([1]))
        # The first claim records the server.
        await one.queue.claim()
        with place.client() as client:
            client.hset(f"{place.keys.limit}:paused", other.name, 2**52)
            client.hset(place.keys.limit, mapping={"pairs_tat": 1, "calls_tat": 1})
        other.expire_heartbeat()
        assert isinstance(await one.queue.claim(), ClaimDeferred)
