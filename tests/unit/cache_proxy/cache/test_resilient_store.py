"""The store that never raises: freshness, outages, full servers and invalidations."""

import asyncio
import time
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from services.cache_proxy.cache.cache_scripts import ADD_TOMBSTONES
from services.cache_proxy.cache.entry import FreshnessPolicy, entry_level, today
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.cache.versioned_store import VersionedStore
from services.cache_proxy.errors import StoreRejectedError
from services.cache_proxy.redis_client.backend import RedisBackend, ScriptCall
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from tests.support.answer_stores import OnRedis, make_metrics, spread_digest, stored_levels, wait_until_stored
from tests.support.redis_server import RedisServer


@pytest.mark.parametrize(
    ("ttl_days", "serve_stale", "age", "expected"),
    [
        (0, False, 300, "fresh"),
        (30, False, 29, "fresh"),
        (30, False, 30, "none"),
        (30, True, 30, "stale"),
        (30, True, 29, "fresh"),
        (1, False, 0, "fresh"),
        (1, False, 1, "none"),
    ],
)
async def test_age_decides_what_is_served(
    on_redis: OnRedis, ttl_days: int, serve_stale: bool, age: int, expected: str
) -> None:
    """An answer is fresh for `--cache-ttl` days; after that it is a miss, or stale if that is served."""
    opened, metrics, _, _ = on_redis
    freshness = FreshnessPolicy(ttl_days, serve_stale)
    resilient = ResilientStore(opened, metrics=metrics, freshness=freshness)
    await opened.put({spread_digest(1): 6}, day=today() - age)
    [entry] = await resilient.get_entries([spread_digest(1)])
    assert entry_level(entry) == (0 if expected == "none" else 6)
    assert freshness.is_fresh(entry, day=today()) is (expected == "fresh")
    assert list(await resilient.get_levels([spread_digest(1)])) == [6 if expected == "fresh" else 0]


@pytest.mark.parametrize("wrong_days", [-40, 0, 40])
@pytest.mark.parametrize(("age", "expected"), [(29, 6), (30, 0)])
async def test_answers_age_by_the_clock_of_the_server(
    on_redis: OnRedis,
    shared_redis: str,
    monkeypatch: pytest.MonkeyPatch,
    wrong_days: int,
    age: int,
    expected: int,
) -> None:
    """With the proxy's clock wrong by weeks, freshness and the difference are measured by Redis's clock."""
    _, metrics, _, base = on_redis
    clock = StoreClock()
    opened = RedisStore(
        backend_for(create_client(shared_redis, timeout_seconds=2)),
        base_key=base,
        metrics=metrics,
        clock=clock,
    )
    resilient = ResilientStore(opened, metrics=metrics, freshness=FreshnessPolicy(ttl_days=30), clock=clock)
    day = today()
    wrong_seconds = wrong_days * 86_400
    wrong_time = SimpleNamespace(time=lambda: time.time() + wrong_seconds, monotonic=time.monotonic)
    monkeypatch.setattr("services.cache_proxy.cache.store_clock.time", wrong_time)
    monkeypatch.setattr("services.cache_proxy.cache.entry.time", wrong_time)
    await opened.put({spread_digest(1): 6}, day=day - age)
    await opened.put({spread_digest(2): 5})
    assert [
        entry_level(entry) for entry in await resilient.get_entries([spread_digest(1), spread_digest(2)])
    ] == [
        expected,
        5,
    ]
    assert list(await resilient.get_levels([spread_digest(1), spread_digest(2)])) == [expected, 5]
    assert clock.today() == day
    assert clock.difference_seconds() == pytest.approx(wrong_seconds, abs=5)
    await opened.close()


@pytest.mark.parametrize(
    ("ttl_days", "serve_stale", "age", "served"),
    [(0, False, 300, True), (30, False, 29, True), (30, False, 30, False), (30, True, 300, True)],
)
async def test_age_decides_whether_previous_version_is_served(
    on_redis: OnRedis, shared_redis: str, ttl_days: int, serve_stale: bool, age: int, served: bool
) -> None:
    """Answers of the previous version age as those of the current one do, and none is fresh."""
    current, metrics, _, base = on_redis
    backend = backend_for(create_client(shared_redis, timeout_seconds=2))
    previous = RedisStore(backend, base_key=f"{base}previous:", metrics=metrics)
    freshness = FreshnessPolicy(ttl_days, serve_stale)
    resilient = ResilientStore(VersionedStore(current, previous), metrics=metrics, freshness=freshness)
    await previous.put({spread_digest(1): 6}, day=today() - age)
    [entry] = await resilient.get_entries([spread_digest(1)])
    assert entry_level(entry) == (6 if served else 0)
    assert not freshness.is_fresh(entry, day=today())
    assert list(await resilient.get_levels([spread_digest(1)])) == [0]
    await previous.close()


async def test_full_server_rejects_writes_and_serves_look_ups(own_redis: RedisServer) -> None:
    """Without memory under `noeviction`, writes are rejected and look-ups continue.

    Pending answers are written once there is memory.
    """
    metrics = make_metrics()
    async with AsyncExitStack() as stack:
        opened = RedisStore(
            backend_for(create_client(own_redis.url, timeout_seconds=2)), base_key="full:", metrics=metrics
        )
        client = stack.enter_context(own_redis.client())
        await opened.put({spread_digest(1): 4})
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreRejectedError):
            await opened.put({spread_digest(2): 4})
        resilient = ResilientStore(opened, metrics=metrics)
        stack.push_async_callback(resilient.close)
        await resilient.put({spread_digest(2): 6})
        assert list(await resilient.get_levels([spread_digest(1), spread_digest(2)])) == [4, 6]
        assert resilient.available
        client.config_set("maxmemory", "0")
        await wait_until_stored(opened, {spread_digest(2): 6})


async def test_answers_during_outage_are_written_when_server_returns(own_redis: RedisServer) -> None:
    """Answers during the outage are kept, served from memory, and written afterwards."""
    opened = RedisStore(
        backend_for(create_client(own_redis.url, timeout_seconds=10)),
        base_key="lost:",
        metrics=make_metrics(),
    )
    resilient = ResilientStore(opened, metrics=make_metrics())
    own_redis.kill()
    await resilient.put({spread_digest(number): number % 7 + 1 for number in range(50)})
    assert not resilient.available
    assert list(await resilient.get_levels([spread_digest(1), spread_digest(99)])) == [2, 0]
    own_redis.start()
    await wait_until_stored(opened, {spread_digest(number): number % 7 + 1 for number in range(50)})
    await resilient.close()


async def test_answer_requested_before_invalidation_is_deleted(
    on_redis: OnRedis, backend: RedisBackend
) -> None:
    """One pair or all are invalidated; later answers stay, and the log names the deleted pair."""
    opened, metrics, client, base = on_redis
    log = InvalidationLog(backend, f"{{{base}}}log")
    resilient = ResilientStore(opened, metrics=metrics, invalidation_log=log)
    requested_at = time.monotonic()
    await asyncio.sleep(0.01)
    for invalidated, remaining_level in ((spread_digest(1), 4), (b"", 0)):
        await backend.run_script(ADD_TOMBSTONES, [ScriptCall(f"{{{base}}}tombs", [invalidated])])
        await resilient.put({spread_digest(1): 3, spread_digest(2): 4}, requested_at=requested_at)
        assert await stored_levels(opened, [spread_digest(1), spread_digest(2)]) == [0, remaining_level]
    first = client.lrange(log.key, 0, 0)
    assert [entry[-16:] for entry in first] == [spread_digest(1)]
    await asyncio.sleep(0.01)
    await resilient.put({spread_digest(1): 3})
    assert await stored_levels(opened, [spread_digest(1)]) == [3]
    await resilient.close()


async def test_pending_answer_invalidated_during_outage_is_deleted(
    own_redis: RedisServer,
) -> None:
    """Pending answers are written when the server is back, except those with a later tombstone."""
    backend = backend_for(create_client(own_redis.url, timeout_seconds=10))
    opened = RedisStore(backend, base_key="lost:", metrics=make_metrics())
    resilient = ResilientStore(
        opened, metrics=make_metrics(), invalidation_log=InvalidationLog(backend, "{lost}log")
    )
    requested_at = time.monotonic()
    await asyncio.sleep(0.01)
    await backend.run_script(ADD_TOMBSTONES, [ScriptCall("{lost}tombs", [spread_digest(1)])])
    own_redis.kill()
    await resilient.put({spread_digest(1): 3, spread_digest(2): 4}, requested_at=requested_at)
    own_redis.start()
    await wait_until_stored(opened, {spread_digest(1): 0, spread_digest(2): 4})
    await resilient.close()
