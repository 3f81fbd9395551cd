"""One suite for every store, and tests of the Redis store with damaged data, a full or a lost server."""

import asyncio
import itertools
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from services.cache_proxy.cache import cache_scripts
from services.cache_proxy.cache.buckets import FIELD_BYTES, TAGS, TagState, tag_for_digest
from services.cache_proxy.cache.cache_scripts import ADD_TOMBSTONES
from services.cache_proxy.cache.entry import FreshnessPolicy, entry_day, entry_level, pack_entry, today
from services.cache_proxy.cache.invalidation import InvalidationLog
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.cache.store import AnswerStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.cache.store_factory import open_store
from services.cache_proxy.cache.versioned_store import VersionedStore
from services.cache_proxy.config.cache_settings import CacheSettings, KeySettings
from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import RedisBackend, ScriptCall
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from services.cache_proxy.redis_keys import tag_state_key
from tests.support.redis_server import RedisServer, redis_process

_prefixes = (f"store{number}" for number in itertools.count())


def _digest(number: int) -> bytes:
    """Return a digest; consecutive numbers are spread over all buckets, as hashes are."""
    return (number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128).to_bytes(16, "big")


async def _levels(store: AnswerStore, digests: Sequence[bytes]) -> list[int]:
    """Return the stored levels, 0 for a miss; all of them must have the current day."""
    entries = await store.get(digests)
    assert all(entry_day(entry) == today() for entry in entries if entry)
    return [entry_level(entry) for entry in entries]


def _metrics() -> ProxyMetrics:
    return ProxyMetrics(CollectorRegistry())


@pytest.fixture(params=["memory", "redis", "embedded"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, shared_redis: str
) -> AsyncIterator[AnswerStore]:
    """Yield a store of each kind, opened as the proxy opens it."""
    url = {"memory": "memory:", "redis": shared_redis, "embedded": f"embedded:{tmp_path}"}[request.param]
    key_settings = KeySettings(key_prefix=next(_prefixes))
    cache = CacheSettings(cache_url=url, cache_timeout_seconds=10)
    async with open_store(cache, key_settings, _metrics()) as opened:
        yield opened.store
        await opened.store.close()


async def test_get_returns_entries_in_the_order_of_digests(store: AnswerStore) -> None:
    """The digests exceed one script call, and include unknown and repeated ones."""
    levels = {_digest(number): number % 7 + 1 for number in range(2500)}
    await store.put(levels)
    digests = [*reversed(levels), _digest(10**6), *list(levels)[:5]]
    assert await _levels(store, digests) == [levels.get(digest, 0) for digest in digests]
    assert list(await store.get([])) == []
    await store.put({})


async def test_last_write_replaces_earlier_ones(store: AnswerStore) -> None:
    """Repeating a write changes nothing; a newer level replaces an older one."""
    for level in (3, 3, 7, 1):
        await store.put({_digest(1): level})
        assert await _levels(store, [_digest(1)]) == [level]


async def test_concurrent_operations_do_not_mix(store: AnswerStore) -> None:
    """Forty concurrent tasks each find the answers that they wrote."""

    async def write_and_read(number: int) -> None:
        levels = {_digest(number * 1000 + index): (number + index) % 7 + 1 for index in range(300)}
        await store.put(levels)
        assert await _levels(store, list(levels)) == list(levels.values())

    await asyncio.gather(*(write_and_read(number) for number in range(40)))


@pytest.fixture
async def on_redis(shared_redis: str) -> AsyncIterator[tuple[RedisStore, ProxyMetrics, "redis.Redis", str]]:
    """Yield a store on the shared server, its metrics, another client of the server, and its base key."""
    metrics = _metrics()
    base_key = f"{next(_prefixes)}:c2:"
    opened = RedisStore(
        backend_for(create_client(shared_redis, timeout_seconds=2)), base_key=base_key, metrics=metrics
    )
    with redis.Redis.from_url(shared_redis) as client:
        yield opened, metrics, client, base_key
    await opened.close()


OnRedis = tuple[RedisStore, ProxyMetrics, "redis.Redis", str]


def _state(client: "redis.Redis", base: str, digest: bytes) -> TagState:
    generation, buckets = client.hmget(tag_state_key(base, tag_for_digest(digest)), "generation", "buckets")
    assert isinstance(generation, bytes)
    assert isinstance(buckets, bytes)
    return TagState(generation.decode(), int(buckets))


def _bucket(client: "redis.Redis", base: str, digest: bytes) -> str:
    return _state(client, base, digest).bucket_key(base, digest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    value=st.sampled_from(
        [
            b"",
            b"x",
            b"-4097",
            b"3.0",
            b" 3",
            b"3\n",
            b"1e3",
            b"nan",
            b"99999",
            b"9" * 20,
            b"0x3",
            b"9007199254740995",
            b"\xff\xfe",
            b"3" * 5000,
            b"--3",
            b"-",
        ]
    )
    | st.binary(max_size=6).filter(lambda value: not value.strip(b"-").isdigit())
)
async def test_garbage_value_is_a_counted_miss_and_is_replaced(on_redis: OnRedis, value: bytes) -> None:
    """A value that no proxy wrote is a miss; its neighbours are found; the next write replaces it."""
    opened, metrics, client, base = on_redis
    good = _digest(1)
    bad = _digest(2)
    await opened.put({good: 5, bad: 1})
    client.hset(_bucket(client, base, bad), bad[FIELD_BYTES], value)
    before = metrics.store_garbage._value.get()
    assert await _levels(opened, [good, bad]) == [5, 0]
    assert metrics.store_garbage._value.get() == before + 1
    await opened.put({bad: 2})
    assert await _levels(opened, [good, bad]) == [5, 2]


async def test_answer_with_future_day_is_garbage(on_redis: OnRedis) -> None:
    """A small number is not taken for an answer of a day far ahead; tomorrow is accepted."""
    opened, metrics, client, base = on_redis
    await opened.put({_digest(1): 5})
    for days, level in ((0, 5), (1, 5), (2, 0), (800, 0)):
        value = -4096 + (today() + days) * 7 + 4
        client.hset(_bucket(client, base, _digest(1)), _digest(1)[FIELD_BYTES], str(value))
        assert [entry_level(entry) for entry in await opened.get([_digest(1)])] == [level]
    assert metrics.store_garbage._value.get() == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda client, key: client.set(key, "x"),
        lambda client, key: client.delete(key),
        lambda client, key: client.hset(key, "buckets", "x"),
        lambda client, key: client.hset(key, "buckets", "3"),
        lambda client, key: client.hset(key, "buckets", "9" * 30),
        lambda client, key: client.hset(key, "generation", "{"),
        lambda client, key: client.hdel(key, "generation"),
    ],
)
async def test_tag_with_garbage_state_starts_empty(
    on_redis: OnRedis, damage: Callable[["redis.Redis", str], None]
) -> None:
    """Pairs of the damaged tag are misses, other tags are unaffected, and the next write repairs it."""
    opened, _, client, base = on_redis
    pairs = {_digest(number): number % 7 + 1 for number in range(400)}
    lost = {digest for digest in pairs if tag_for_digest(digest) == tag_for_digest(_digest(3))}
    await opened.put(pairs)
    damage(client, tag_state_key(base, tag_for_digest(_digest(3))))
    expected = {digest: 0 if digest in lost else level for digest, level in pairs.items()}
    assert await _levels(opened, list(pairs)) == list(expected.values())
    await opened.put({digest: pairs[digest] for digest in lost})
    assert await _levels(opened, list(pairs)) == list(pairs.values())


@pytest.mark.parametrize("kind", ["string", "list", "set"])
async def test_bucket_of_wrong_type_is_a_miss_and_is_replaced(on_redis: OnRedis, kind: str) -> None:
    """A key of another type under a bucket's name causes a miss and no error."""
    opened, metrics, client, base = on_redis
    await opened.put({_digest(3): 1})
    bucket = _bucket(client, base, _digest(3))
    client.delete(bucket)
    if kind == "string":
        client.set(bucket, "x")
    elif kind == "list":
        client.rpush(bucket, "x")
    else:
        client.sadd(bucket, "x")
    assert await _levels(opened, [_digest(3)]) == [0]
    assert metrics.store_garbage._value.get() == 1
    await opened.put({_digest(3): 6})
    assert await _levels(opened, [_digest(3)]) == [6]


async def test_cache_grows_by_single_buckets_that_stay_small(on_redis: OnRedis) -> None:
    """While the cache grows to 60,000 pairs, every stored pair is found.

    Each bucket is a listpack of at most 128 pairs (the smallest limit of any server's configuration), every
    tag grows with its pairs, and the pairs are counted.
    """
    opened, _, client, base = on_redis
    levels: dict[bytes, int] = {}
    for first in range(0, 60_000, 6_000):
        more = {_digest(number): number % 7 + 1 for number in range(first, first + 6_000)}
        await opened.put(more)
        levels |= more
        sample = list(levels)[:: 1 + first // 3000]
        assert await _levels(opened, sample) == [levels[digest] for digest in sample]
    assert await _levels(opened, list(levels)) == list(levels.values())
    counted = 0
    for tag in range(TAGS):
        inspection = await opened.inspect(tag, samples=30, start=0.0)
        counted += inspection.pairs
        assert inspection.pairs - 56 * (inspection.buckets - 1) >= 0 or inspection.buckets == 4
        assert {encoding for encoding, _, _ in inspection.samples} == {"listpack"}
    assert counted == len(levels)
    sizes = [client.hlen(key) for key in client.scan_iter(f"{base}{{*}}?*:*", count=1000)]
    assert sum(sizes) == len(levels)
    assert max(sizes) <= 128


async def test_bucket_split_drops_garbage(on_redis: OnRedis) -> None:
    """Invalid fields, values and buckets are dropped by a split; valid pairs are moved."""
    opened, metrics, client, base = on_redis
    levels = {bytes((5,)) + os.urandom(15): 3 for _ in range(200)}
    await opened.put(dict(list(levels.items())[:30]))
    kept = next(iter(levels))
    bucket = _bucket(client, base, kept)
    client.hset(bucket, "short", "-1000")
    client.hset(bucket, kept[FIELD_BYTES], "nonsense")
    client.set(
        tag_state_key(base, 1) + _state(client, base, kept).generation + ":4", "a bucket of another column"
    )
    await opened.put(levels)
    await opened.put({bytes((column,)) + os.urandom(15): 2 for column in (4, 6, 7) for _ in range(200)})
    assert metrics.store_garbage._value.get() >= 2
    assert await _levels(opened, list(levels)) == [3] * len(levels)
    assert not [key for key in client.scan_iter(f"{base}*") if client.type(key) != b"hash"]


async def test_put_with_day_keeps_newer_answers(on_redis: OnRedis) -> None:
    """An answer keeps the day with which it was written; an older answer never replaces a newer one."""
    opened, _, _, _ = on_redis
    await opened.put({_digest(1): 5}, day=today() - 10)
    assert list(await opened.get([_digest(1)])) == [pack_entry(5, today() - 10)]
    await opened.put({_digest(1): 4}, day=today() - 3)
    await opened.put({_digest(1): 3}, day=today() - 4)
    assert list(await opened.get([_digest(1)])) == [pack_entry(4, today() - 3)]
    await opened.put({_digest(1): 2})
    await opened.put({_digest(1): 1}, day=today() - 1)
    assert list(await opened.get([_digest(1)])) == [pack_entry(2, today())]


async def _sweep(opened: RedisStore, *, retention_days: int = 0) -> int:
    """Sweep every tag from end to end and return the number of pairs removed."""
    removed = 0
    for tag in range(TAGS):
        while True:
            result = await opened.sweep(tag, retention_days=retention_days, buckets=500)
            removed += result.removed
            if not result.has_leftovers:
                break
    return removed


async def test_sweep_removes_only_expired_pairs_and_garbage(on_redis: OnRedis) -> None:
    """Pairs beyond the retention and garbage are removed; the others stay and are counted."""
    opened, metrics, client, base = on_redis
    old = {_digest(number): number % 7 + 1 for number in range(3000)}
    young = {_digest(number): number % 7 + 1 for number in range(3000, 5000)}
    await opened.put(old, day=today() - 30)
    await opened.put(young, day=today() - 29)
    client.hset(_bucket(client, base, _digest(4000)), "garbage", "x")
    assert await _sweep(opened) == 0
    assert metrics.store_garbage._value.get() == 1
    assert await _sweep(opened, retention_days=30) == 3000
    assert not any(await opened.get(list(old)))
    assert [entry_level(entry) for entry in await opened.get(list(young))] == list(young.values())
    assert sum([(await opened.inspect(tag, samples=1, start=0)).pairs for tag in range(TAGS)]) == 2000


async def test_sweep_step_is_bounded_and_next_step_continues(on_redis: OnRedis) -> None:
    """With ten buckets a step, the whole tag is swept after exactly as many steps as that takes."""
    opened, _, _, _ = on_redis
    await opened.put({bytes((number % 4,)) + os.urandom(15): 1 for number in range(4000)}, day=0)
    buckets = (await opened.inspect(0, samples=1, start=0)).buckets
    steps = [
        (await opened.sweep(0, retention_days=1, buckets=10)).removed for _ in range((buckets + 13) // 10)
    ]
    assert sum(steps) == 4000
    assert max(steps) < 10 * 128
    assert all(steps[: buckets // 10 - 1])


async def test_delete_removes_only_the_given_pairs(on_redis: OnRedis) -> None:
    """Only stored pairs are counted, and other pairs stay."""
    opened, _, _, _ = on_redis
    await opened.put({_digest(number): 4 for number in range(100)})
    assert await opened.delete([_digest(7), _digest(8), _digest(1000)]) == 2
    assert await _levels(opened, [_digest(number) for number in range(10)]) == [4] * 7 + [0, 0, 4]


async def test_delete_of_many_pairs_takes_several_calls(on_redis: OnRedis) -> None:
    """A thousand pairs are deleted by calls that occupy Redis no longer than a write does."""
    opened, _, client, _ = on_redis
    levels = {_digest(number): 3 for number in range(1000)}
    await opened.put(levels)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert await opened.delete(list(levels)) == 1000
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before >= 3
    assert not any(await opened.get(list(levels)))


async def test_clear_is_immediate_and_sweep_frees_memory(on_redis: OnRedis) -> None:
    """After `clear` every pair is a miss, new pairs are stored, and the sweep removes the old buckets."""
    opened, _, client, base = on_redis
    await opened.put({_digest(number): 4 for number in range(5000)})
    assert await opened.clear() == 5000
    assert not any(await opened.get([_digest(number) for number in range(5000)]))
    await opened.put({_digest(1): 2})
    # The second generation begins within the same minute as the first.
    assert await opened.clear() == 1
    await opened.put({_digest(1): 3})
    await _sweep(opened)
    assert await _levels(opened, [_digest(1), _digest(2)]) == [3, 0]
    assert len([key for key in client.scan_iter(f"{base}{{*}}?*") if client.hlen(key)]) == 1


def test_python_and_lua_compute_the_same_bucket(shared_redis: str) -> None:
    """Both return the same bucket for a digest, at every size of a tag."""
    script = (
        (cache_scripts._FOLDER / "layout.lua").read_text()
        + """
        local first, scale = column_of(tonumber(ARGV[1]), byte(ARGV[2], 1) % COLUMNS)
        local b0, b1, b2, b3 = byte(ARGV[2], 1, 4)
        return format('%x', bucket_number(b1, b2, b3, first, scale) * COLUMNS + b0 % COLUMNS)"""
    )
    with redis.Redis.from_url(shared_redis) as client:
        for buckets in [*range(4, 60), 2**16 - 1, 2**16, 2**16 + 1, 60_001]:
            for digest in (
                _digest(buckets * 11 + 1),
                bytes(16),
                b"\x03" + b"\xff" * 15,
                b"\x01" + b"\x80" * 15,
            ):
                name = client.eval(script, 1, "x{00}", buckets, digest)
                assert TagState("g", buckets).bucket_key("x", digest).rpartition(":")[2] == name.decode()


@pytest.mark.parametrize("buckets", [4, 40, 255, 256, 300, 60_001, 2**20, 2**24])
async def test_look_up_finds_bucket_of_any_number(on_redis: OnRedis, buckets: int) -> None:
    """The names of buckets have one hexadecimal digit or several."""
    opened, _, client, base = on_redis
    digests = [_digest(number) for number in range(200)]
    for tag in range(TAGS):
        client.hset(tag_state_key(base, tag), mapping={"generation": "a", "buckets": buckets, "pairs": 0})
    for digest in digests:
        name = TagState("a", buckets).bucket_key(base, digest)
        client.hset(name, digest[FIELD_BYTES], str(-4096 + today() * 7 + 4))
    assert await _levels(opened, digests) == [5] * 200


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
    await opened.put({_digest(1): 6}, day=today() - age)
    [entry] = await resilient.get_entries([_digest(1)])
    assert entry_level(entry) == (0 if expected == "none" else 6)
    assert freshness.is_fresh(entry, day=today()) is (expected == "fresh")
    assert list(await resilient.get_levels([_digest(1)])) == [6 if expected == "fresh" else 0]


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
    await opened.put({_digest(1): 6}, day=day - age)
    await opened.put({_digest(2): 5})
    assert [entry_level(entry) for entry in await resilient.get_entries([_digest(1), _digest(2)])] == [
        expected,
        5,
    ]
    assert list(await resilient.get_levels([_digest(1), _digest(2)])) == [expected, 5]
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
    await previous.put({_digest(1): 6}, day=today() - age)
    [entry] = await resilient.get_entries([_digest(1)])
    assert entry_level(entry) == (6 if served else 0)
    assert not freshness.is_fresh(entry, day=today())
    assert list(await resilient.get_levels([_digest(1)])) == [0]
    await previous.close()


async def test_scripts_are_loaded_again_after_script_flush(on_redis: OnRedis) -> None:
    """A restart or SCRIPT FLUSH of the server makes no operation fail."""
    opened, _, client, _ = on_redis
    await opened.put({_digest(5): 1})
    client.script_flush()
    assert await _levels(opened, [_digest(5)]) == [1]
    client.script_flush()
    await opened.put({_digest(5): 2})
    assert await _levels(opened, [_digest(5)]) == [2]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Yield a server for this test only, to stop and to fill."""
    with redis_process(tmp_path) as server:
        yield server


@pytest.mark.slow
async def test_operations_on_silent_server_share_one_timeout(own_redis: RedisServer) -> None:
    """All waiting look-ups and writes fail when the first one does, which is tried twice."""
    opened = RedisStore(
        backend_for(create_client(own_redis.url, timeout_seconds=2)), base_key="p:", metrics=_metrics()
    )
    assert await _levels(opened, [_digest(1)]) == [0]
    own_redis.pause()
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    digests = [_digest(number) for number in range(300)]
    gets = (opened.get(digests) for _ in range(100))
    puts = (opened.put({_digest(1): 1}) for _ in range(100))
    outcomes = await asyncio.gather(*gets, *puts, return_exceptions=True)
    assert all(isinstance(outcome, StoreError) for outcome in outcomes)
    # A second operation with its retry would take until then.
    assert loop.time() - started_at < 4 * 2
    own_redis.resume()
    assert await _levels(opened, [_digest(1)]) == [0]
    await opened.close()


async def test_full_server_rejects_writes_and_serves_look_ups(own_redis: RedisServer) -> None:
    """Without memory under `noeviction`, writes are rejected and look-ups continue.

    Pending answers are written once there is memory.
    """
    metrics = _metrics()
    async with AsyncExitStack() as stack:
        opened = RedisStore(
            backend_for(create_client(own_redis.url, timeout_seconds=2)), base_key="full:", metrics=metrics
        )
        client = stack.enter_context(own_redis.client())
        await opened.put({_digest(1): 4})
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreRejectedError):
            await opened.put({_digest(2): 4})
        resilient = ResilientStore(opened, metrics=metrics)
        stack.push_async_callback(resilient.close)
        await resilient.put({_digest(2): 6})
        assert list(await resilient.get_levels([_digest(1), _digest(2)])) == [4, 6]
        assert resilient.available
        client.config_set("maxmemory", "0")
        await _wait_until_stored(opened, {_digest(2): 6})


async def _wait_until_stored(store: AnswerStore, levels: dict[bytes, int]) -> None:
    """Poll until the store has these levels; pending answers are written in the background."""
    async with asyncio.timeout(10):
        while await _levels(store, list(levels)) != list(levels.values()):  # noqa: ASYNC110 - no event to await
            await asyncio.sleep(0.05)


async def test_answers_during_outage_are_written_when_server_returns(own_redis: RedisServer) -> None:
    """Answers during the outage are kept, served from memory, and written afterwards."""
    opened = RedisStore(
        backend_for(create_client(own_redis.url, timeout_seconds=10)), base_key="lost:", metrics=_metrics()
    )
    resilient = ResilientStore(opened, metrics=_metrics())
    own_redis.kill()
    await resilient.put({_digest(number): number % 7 + 1 for number in range(50)})
    assert not resilient.available
    assert list(await resilient.get_levels([_digest(1), _digest(99)])) == [2, 0]
    own_redis.start()
    await _wait_until_stored(opened, {_digest(number): number % 7 + 1 for number in range(50)})
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
    for invalidated, remaining_level in ((_digest(1), 4), (b"", 0)):
        await backend.run_script(ADD_TOMBSTONES, [ScriptCall(f"{{{base}}}tombs", [invalidated])])
        await resilient.put({_digest(1): 3, _digest(2): 4}, requested_at=requested_at)
        assert await _levels(opened, [_digest(1), _digest(2)]) == [0, remaining_level]
    first = client.lrange(log.key, 0, 0)
    assert [entry[-16:] for entry in first] == [_digest(1)]
    await asyncio.sleep(0.01)
    await resilient.put({_digest(1): 3})
    assert await _levels(opened, [_digest(1)]) == [3]
    await resilient.close()


async def test_pending_answer_invalidated_during_outage_is_deleted(
    own_redis: RedisServer,
) -> None:
    """Pending answers are written when the server is back, except those with a later tombstone."""
    backend = backend_for(create_client(own_redis.url, timeout_seconds=10))
    opened = RedisStore(backend, base_key="lost:", metrics=_metrics())
    resilient = ResilientStore(
        opened, metrics=_metrics(), invalidation_log=InvalidationLog(backend, "{lost}log")
    )
    requested_at = time.monotonic()
    await asyncio.sleep(0.01)
    await backend.run_script(ADD_TOMBSTONES, [ScriptCall("{lost}tombs", [_digest(1)])])
    own_redis.kill()
    await resilient.put({_digest(1): 3, _digest(2): 4}, requested_at=requested_at)
    own_redis.start()
    await _wait_until_stored(opened, {_digest(1): 0, _digest(2): 4})
    await resilient.close()


@pytest.mark.parametrize(
    "old", ["garbage", "ab,9999999999999999,0;", "ab,-1,0;", "ab,8,0", "", "ab,8,99999999999;"]
)
async def test_garbage_in_list_of_old_generations_is_removed(on_redis: OnRedis, old: str) -> None:
    """A caller that sweeps until nothing is left over does not sweep forever."""
    opened, _, client, base = on_redis
    await opened.put({bytes(16): 4})
    client.hset(tag_state_key(base, 0), "old", old)
    has_leftovers = [(await opened.sweep(0, buckets=100)).has_leftovers for _ in range(3)]
    assert not has_leftovers[-1]
    assert not client.hexists(tag_state_key(base, 0), "old")
    assert await _levels(opened, [bytes(16)]) == [4]
