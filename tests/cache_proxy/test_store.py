"""One suite for every store, and what a server may do to the one behind Redis's protocol."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.cache_proxy.config import CacheSettings, KeySettings
from services.cache_proxy.errors import StoreError, StoreRefused
from services.cache_proxy.metrics import ProxyMetrics
from services.cache_proxy.store import Store
from services.cache_proxy.store.guarded import GuardedStore
from services.cache_proxy.store.opening import open_store
from services.cache_proxy.store.redis import RedisStore, connect
from tests.support.redis_server import RedisServer, redis_process

_prefixes = (f"store{number}" for number in itertools.count())


def _digest(number: int) -> bytes:
    """Spread over all buckets, as hashes are."""
    return (number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128).to_bytes(16, "big")


def _metrics() -> ProxyMetrics:
    return ProxyMetrics(CollectorRegistry())


@pytest.fixture(params=["memory", "redis", "embedded"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, shared_redis: str) -> AsyncIterator[Store]:
    """Each kind of store, opened as the proxy opens it."""
    url = {"memory": "memory:", "redis": shared_redis, "embedded": f"embedded:{tmp_path}"}[request.param]
    key = KeySettings(key_prefix=next(_prefixes))
    cache = CacheSettings(cache_url=url, cache_timeout_seconds=10)
    async with open_store(cache, key, _metrics()) as opened:
        yield opened.store
        await opened.store.close()


async def test_what_was_put_is_found_in_the_order_asked(store: Store) -> None:
    """More than one script call's worth, known and unknown mixed, repeats too."""
    levels = {_digest(number): number % 7 + 1 for number in range(2500)}
    await store.put(levels)
    asked = [*reversed(levels), _digest(10**6), *list(levels)[:5]]
    assert list(await store.get(asked)) == [levels.get(digest, 0) for digest in asked]
    assert list(await store.get([])) == []
    await store.put({})


async def test_the_last_write_counts(store: Store) -> None:
    """Repeating changes nothing, a newer level replaces the older."""
    for level in (3, 3, 7, 1):
        await store.put({_digest(1): level})
        assert list(await store.get([_digest(1)])) == [level]


async def test_operations_at_once_do_not_mix(store: Store) -> None:
    """Forty writers and readers side by side each find their own."""

    async def one(number: int) -> None:
        mine = {_digest(number * 1000 + place): (number + place) % 7 + 1 for place in range(300)}
        await store.put(mine)
        assert list(await store.get(list(mine))) == list(mine.values())

    await asyncio.gather(*(one(number) for number in range(40)))


@pytest.fixture
async def on_redis(shared_redis: str) -> AsyncIterator[tuple[RedisStore, ProxyMetrics, "redis.Redis", str]]:
    """A store on the shared server, its metrics, a client beside it, and its namespace."""
    metrics, namespace = _metrics(), f"{next(_prefixes)}:"
    opened = RedisStore(connect(shared_redis, timeout_seconds=2), namespace=namespace, metrics=metrics)
    with redis.Redis.from_url(shared_redis) as client:
        yield opened, metrics, client, namespace
    await opened.close()


OnRedis = tuple[RedisStore, ProxyMetrics, "redis.Redis", str]


def _bucket(namespace: str, digest: bytes) -> str:
    return f"{namespace}{int.from_bytes(digest[:2], 'big') << 2 | digest[2] & 3:05x}"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    value=st.sampled_from(
        [b"", b"x", b"0", b"8", b"-3", b"3.0", b" 3", b"3\n", b"1e3", b"nan", b"65539", b"9" * 20,
         b"9007199254740995", b"\xff\xfe", b"0x3", b"3" * 5000]
    )
    | st.binary(max_size=6).filter(lambda value: not value.isdigit())
)  # fmt: skip
async def test_garbage_is_a_miss_that_is_counted_and_healed(on_redis: OnRedis, value: bytes) -> None:
    """A value that no proxy wrote becomes no answer, hides no neighbour, and goes with the next write."""
    opened, metrics, client, namespace = on_redis
    good, bad = _digest(1), _digest(2)
    await opened.put({good: 5})
    client.hset(_bucket(namespace, bad), bad[4:].decode("latin-1").encode("latin-1"), value)
    before = metrics.store_garbage._value.get()
    assert list(await opened.get([good, bad])) == [5, 0]
    assert metrics.store_garbage._value.get() == before + 1
    await opened.put({bad: 2})
    assert list(await opened.get([good, bad])) == [5, 2]


@pytest.mark.parametrize("kind", ["string", "list", "set"])
async def test_a_bucket_of_a_wrong_type_is_a_miss_that_is_healed(on_redis: OnRedis, kind: str) -> None:
    """Someone else's key under a bucket's name is no answer and no error."""
    opened, metrics, client, namespace = on_redis
    bucket = _bucket(namespace, _digest(3))
    if kind == "string":
        client.set(bucket, "x")
    elif kind == "list":
        client.rpush(bucket, "x")
    else:
        client.sadd(bucket, "x")
    assert list(await opened.get([_digest(3)])) == [0]
    assert metrics.store_garbage._value.get() == 1
    await opened.put({_digest(3): 6})
    assert list(await opened.get([_digest(3)])) == [6]


async def test_buckets_stay_in_the_compact_encoding(on_redis: OnRedis) -> None:
    """A bucket is a listpack: that is what makes a pair cost 18 bytes."""
    opened, _, client, namespace = on_redis
    await opened.put({_digest(4): 6})
    assert client.object("ENCODING", _bucket(namespace, _digest(4))) in {b"listpack", b"ziplist"}


async def test_scripts_that_the_server_forgot_are_loaded_again(on_redis: OnRedis) -> None:
    """A restart or SCRIPT FLUSH costs nobody an answer."""
    opened, _, client, _ = on_redis
    await opened.put({_digest(5): 1})
    client.script_flush()
    assert list(await opened.get([_digest(5)])) == [1]
    client.script_flush()
    await opened.put({_digest(5): 2})
    assert list(await opened.get([_digest(5)])) == [2]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to stop and fill."""
    with redis_process(tmp_path) as server:
        yield server


async def test_many_who_wait_for_a_silent_server_wait_once(own_redis: RedisServer) -> None:
    """Look-ups and writes for many calls of a script all fail with the first, which is tried twice."""
    opened = RedisStore(connect(own_redis.url, timeout_seconds=2), namespace="p:", metrics=_metrics())
    assert list(await opened.get([_digest(1)])) == [0]
    own_redis.pause()
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    many = [_digest(number) for number in range(300)]
    gets, puts = (opened.get(many) for _ in range(100)), (opened.put({_digest(1): 1}) for _ in range(100))
    ended = await asyncio.gather(*gets, *puts, return_exceptions=True)
    assert all(isinstance(error, StoreError) for error in ended)
    assert loop.time() - started_at < 4 * 2  # as a second one would take
    own_redis.resume()
    assert list(await opened.get([_digest(1)])) == [0]
    await opened.close()


async def test_a_full_server_refuses_and_keeps_answering(own_redis: RedisServer) -> None:
    """Out of memory under noeviction: writes are refused as such, look-ups go on, and what was not saved
    is written once there is room.
    """  # noqa: D205 - one thought
    metrics = _metrics()
    async with AsyncExitStack() as stack:
        opened = RedisStore(connect(own_redis.url, timeout_seconds=2), namespace="full:", metrics=metrics)
        client = stack.enter_context(own_redis.client())
        await opened.put({_digest(1): 4})
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreRefused):
            await opened.put({_digest(2): 4})
        guarded = GuardedStore(opened, metrics=metrics)
        stack.push_async_callback(guarded.close)
        await guarded.put({_digest(2): 6})
        assert list(await guarded.get([_digest(1), _digest(2)])) == [4, 6]
        assert guarded.up
        client.config_set("maxmemory", "0")
        await _until_known(opened, {_digest(2): 6})


async def _until_known(store: Store, levels: dict[bytes, int]) -> None:
    """Poll until the store has these levels: the guard writes them as soon as it can."""
    async with asyncio.timeout(10):
        while list(await store.get(list(levels))) != list(levels.values()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)


async def test_what_a_lost_server_missed_is_written_when_it_returns(own_redis: RedisServer) -> None:
    """Answers given while it was away are kept, served from memory, and saved."""
    opened = RedisStore(connect(own_redis.url, timeout_seconds=10), namespace="lost:", metrics=_metrics())
    guarded = GuardedStore(opened, metrics=_metrics())
    own_redis.kill()
    await guarded.put({_digest(number): number % 7 + 1 for number in range(50)})
    assert not guarded.up
    assert list(await guarded.get([_digest(1), _digest(99)])) == [2, 0]
    own_redis.start()
    await _until_known(opened, {_digest(number): number % 7 + 1 for number in range(50)})
    await guarded.close()
