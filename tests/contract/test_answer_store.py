"""One suite for every store, and what a server may do to the one behind Redis's protocol."""

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
    """Spread over all buckets, as hashes are."""
    return (number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128).to_bytes(16, "big")


async def _levels(store: AnswerStore, digests: Sequence[bytes]) -> list[int]:
    """The levels known, all of them of today."""
    entries = await store.get(digests)
    assert all(entry_day(entry) == today() for entry in entries if entry)
    return [entry_level(entry) for entry in entries]


def _metrics() -> ProxyMetrics:
    return ProxyMetrics(CollectorRegistry())


@pytest.fixture(params=["memory", "redis", "embedded"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, shared_redis: str
) -> AsyncIterator[AnswerStore]:
    """Each kind of store, opened as the proxy opens it."""
    url = {"memory": "memory:", "redis": shared_redis, "embedded": f"embedded:{tmp_path}"}[request.param]
    key = KeySettings(key_prefix=next(_prefixes))
    cache = CacheSettings(cache_url=url, cache_timeout_seconds=10)
    async with open_store(cache, key, _metrics()) as opened:
        yield opened.store
        await opened.store.close()


async def test_what_was_put_is_found_in_the_order_asked(store: AnswerStore) -> None:
    """More than one script call's worth, known and unknown mixed, repeats too."""
    levels = {_digest(number): number % 7 + 1 for number in range(2500)}
    await store.put(levels)
    asked = [*reversed(levels), _digest(10**6), *list(levels)[:5]]
    assert await _levels(store, asked) == [levels.get(digest, 0) for digest in asked]
    assert list(await store.get([])) == []
    await store.put({})


async def test_the_last_write_counts(store: AnswerStore) -> None:
    """Repeating changes nothing, a newer level replaces the older."""
    for level in (3, 3, 7, 1):
        await store.put({_digest(1): level})
        assert await _levels(store, [_digest(1)]) == [level]


async def test_operations_at_once_do_not_mix(store: AnswerStore) -> None:
    """Forty writers and readers side by side each find their own."""

    async def one(number: int) -> None:
        mine = {_digest(number * 1000 + place): (number + place) % 7 + 1 for place in range(300)}
        await store.put(mine)
        assert await _levels(store, list(mine)) == list(mine.values())

    await asyncio.gather(*(one(number) for number in range(40)))


@pytest.fixture
async def on_redis(shared_redis: str) -> AsyncIterator[tuple[RedisStore, ProxyMetrics, "redis.Redis", str]]:
    """A store on the shared server, its metrics, a client beside it, and its namespace."""
    metrics, namespace = _metrics(), f"{next(_prefixes)}:c2:"
    opened = RedisStore(
        backend_for(create_client(shared_redis, timeout_seconds=2)), base_key=namespace, metrics=metrics
    )
    with redis.Redis.from_url(shared_redis) as client:
        yield opened, metrics, client, namespace
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
async def test_garbage_is_a_miss_that_is_counted_and_healed(on_redis: OnRedis, value: bytes) -> None:
    """A value that no proxy wrote becomes no answer, hides no neighbour, and goes with the next write."""
    opened, metrics, client, base = on_redis
    good, bad = _digest(1), _digest(2)
    await opened.put({good: 5, bad: 1})
    client.hset(_bucket(client, base, bad), bad[FIELD_BYTES], value)
    before = metrics.store_garbage._value.get()
    assert await _levels(opened, [good, bad]) == [5, 0]
    assert metrics.store_garbage._value.get() == before + 1
    await opened.put({bad: 2})
    assert await _levels(opened, [good, bad]) == [5, 2]


async def test_an_answer_from_the_future_is_garbage(on_redis: OnRedis) -> None:
    """A small number that happens to be one is not taken for an answer of years to come."""
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
async def test_a_tag_whose_state_is_garbage_begins_anew(
    on_redis: OnRedis, damage: Callable[["redis.Redis", str], None]
) -> None:
    """What cannot be found any more is a miss, other tags are none the worse, and the next write heals."""
    opened, _, client, base = on_redis
    pairs = {_digest(number): number % 7 + 1 for number in range(400)}
    hurt = {digest for digest in pairs if tag_for_digest(digest) == tag_for_digest(_digest(3))}
    await opened.put(pairs)
    damage(client, tag_state_key(base, tag_for_digest(_digest(3))))
    expected = {digest: 0 if digest in hurt else level for digest, level in pairs.items()}
    assert await _levels(opened, list(pairs)) == list(expected.values())
    await opened.put({digest: pairs[digest] for digest in hurt})
    assert await _levels(opened, list(pairs)) == list(pairs.values())


@pytest.mark.parametrize("kind", ["string", "list", "set"])
async def test_a_bucket_of_a_wrong_type_is_a_miss_that_is_healed(on_redis: OnRedis, kind: str) -> None:
    """Someone else's key under a bucket's name is no answer and no error."""
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


async def test_the_cache_grows_bucket_by_bucket_and_buckets_stay_small(on_redis: OnRedis) -> None:
    """From nothing to 60,000 pairs: every pair is found on the way, each bucket is a listpack of at most 128
    pairs (the least limit that is set anywhere), no tag lags behind, and the pairs are counted.
    """  # noqa: D205 - one thought
    opened, _, client, base = on_redis
    levels: dict[bytes, int] = {}
    for first in range(0, 60_000, 6_000):
        more = {_digest(number): number % 7 + 1 for number in range(first, first + 6_000)}
        await opened.put(more)
        levels |= more
        some = list(levels)[:: 1 + first // 3000]
        assert await _levels(opened, some) == [levels[digest] for digest in some]
    assert await _levels(opened, list(levels)) == list(levels.values())
    counted = 0
    for tag in range(TAGS):
        found = await opened.inspect(tag, samples=30, start=0.0)
        counted += found.pairs
        assert found.pairs - 56 * (found.buckets - 1) >= 0 or found.buckets == 4
        assert {encoding for encoding, _, _ in found.samples} == {"listpack"}
    assert counted == len(levels)
    sizes = [client.hlen(key) for key in client.scan_iter(f"{base}{{*}}?*:*", count=1000)]
    assert sum(sizes) == len(levels)
    assert max(sizes) <= 128


async def test_garbage_goes_when_its_bucket_splits(on_redis: OnRedis) -> None:
    """A field that is none, a value that is none, a bucket that is none: growth takes along what is sound."""
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


async def test_an_answer_keeps_its_day_and_a_newer_one_its_place(on_redis: OnRedis) -> None:
    """What is written as of a day is known as of that day; an older answer never replaces a newer one."""
    opened, _, _, _ = on_redis
    await opened.put({_digest(1): 5}, day=today() - 10)
    assert list(await opened.get([_digest(1)])) == [pack_entry(5, today() - 10)]
    await opened.put({_digest(1): 4}, day=today() - 3)
    await opened.put({_digest(1): 3}, day=today() - 4)
    assert list(await opened.get([_digest(1)])) == [pack_entry(4, today() - 3)]
    await opened.put({_digest(1): 2})
    await opened.put({_digest(1): 1}, day=today() - 1)
    assert list(await opened.get([_digest(1)])) == [pack_entry(2, today())]


async def _sweep(opened: RedisStore, *, kept_days: int = 0) -> int:
    """Until every tag was looked at from end to end; the pairs removed."""
    removed = 0
    for tag in range(TAGS):
        while True:
            swept = await opened.sweep(tag, retention_days=kept_days, buckets=500)
            removed += swept.removed
            if not swept.has_leftovers:
                break
    return removed


async def test_the_sweep_drops_what_is_expired_and_nothing_else(on_redis: OnRedis) -> None:
    """Pairs older than the oldest day that is kept leave memory, as does garbage; the rest stays, counted."""
    opened, metrics, client, base = on_redis
    old = {_digest(number): number % 7 + 1 for number in range(3000)}
    young = {_digest(number): number % 7 + 1 for number in range(3000, 5000)}
    await opened.put(old, day=today() - 30)
    await opened.put(young, day=today() - 29)
    client.hset(_bucket(client, base, _digest(4000)), "garbage", "x")
    assert await _sweep(opened) == 0
    assert metrics.store_garbage._value.get() == 1
    assert await _sweep(opened, kept_days=30) == 3000
    assert not any(await opened.get(list(old)))
    assert [entry_level(entry) for entry in await opened.get(list(young))] == list(young.values())
    assert sum([(await opened.inspect(tag, samples=1, start=0)).pairs for tag in range(TAGS)]) == 2000


async def test_a_step_of_the_sweep_is_bounded_and_the_next_goes_on(on_redis: OnRedis) -> None:
    """Ten buckets a step: after as many steps as that takes, and no sooner, the whole tag was looked at."""
    opened, _, _, _ = on_redis
    await opened.put({bytes((number % 4,)) + os.urandom(15): 1 for number in range(4000)}, day=0)
    buckets = (await opened.inspect(0, samples=1, start=0)).buckets
    steps = [
        (await opened.sweep(0, retention_days=1, buckets=10)).removed for _ in range((buckets + 13) // 10)
    ]
    assert sum(steps) == 4000
    assert max(steps) < 10 * 128
    assert all(steps[: buckets // 10 - 1])


async def test_forgetting_a_pair_forgets_that_pair(on_redis: OnRedis) -> None:
    """It and no other is gone, whether or not it was there."""
    opened, _, _, _ = on_redis
    await opened.put({_digest(number): 4 for number in range(100)})
    assert await opened.delete([_digest(7), _digest(8), _digest(1000)]) == 2
    assert await _levels(opened, [_digest(number) for number in range(10)]) == [4] * 7 + [0, 0, 4]


async def test_forgetting_many_is_no_longer_for_redis_than_writing_them(on_redis: OnRedis) -> None:
    """A thousand take several calls, and all of them are gone."""
    opened, _, client, _ = on_redis
    levels = {_digest(number): 3 for number in range(1000)}
    await opened.put(levels)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert await opened.delete(list(levels)) == 1000
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before >= 3
    assert not any(await opened.get(list(levels)))


async def test_clearing_is_at_once_and_the_sweep_frees_the_memory(on_redis: OnRedis) -> None:
    """After `clear` nothing is known, what is written next is, and the sweep removes what was left behind."""
    opened, _, client, base = on_redis
    await opened.put({_digest(number): 4 for number in range(5000)})
    assert await opened.clear() == 5000
    assert not any(await opened.get([_digest(number) for number in range(5000)]))
    await opened.put({_digest(1): 2})
    assert await opened.clear() == 1  # within the same minute
    await opened.put({_digest(1): 3})
    await _sweep(opened)
    assert await _levels(opened, [_digest(1), _digest(2)]) == [3, 0]
    assert len([key for key in client.scan_iter(f"{base}{{*}}?*") if client.hlen(key)]) == 1


def test_the_pythons_layout_is_the_scripts(shared_redis: str) -> None:
    """Both name the same bucket for a digest, at every size."""
    naming = (
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
                name = client.eval(naming, 1, "x{00}", buckets, digest)
                assert TagState("g", buckets).bucket_key("x", digest).rpartition(":")[2] == name.decode()


@pytest.mark.parametrize("buckets", [4, 40, 255, 256, 300, 60_001, 2**20, 2**24])
async def test_a_look_up_finds_a_bucket_whatever_its_number(on_redis: OnRedis, buckets: int) -> None:
    """In a tag of any size, names of one digit and of many."""
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
async def test_age_decides_what_is_answered(
    on_redis: OnRedis, ttl_days: int, serve_stale: bool, age: int, expected: str
) -> None:
    """An answer is fresh for as many days as `--cache-ttl` says, then none, or stale if that is served."""
    opened, metrics, _, _ = on_redis
    lifetime = FreshnessPolicy(ttl_days, serve_stale)
    guarded = ResilientStore(opened, metrics=metrics, freshness=lifetime)
    await opened.put({_digest(1): 6}, day=today() - age)
    [entry] = await guarded.get_entries([_digest(1)])
    assert entry_level(entry) == (0 if expected == "none" else 6)
    assert lifetime.is_fresh(entry, day=today()) is (expected == "fresh")
    assert list(await guarded.get_levels([_digest(1)])) == [6 if expected == "fresh" else 0]


@pytest.mark.parametrize("wrong_days", [-40, 0, 40])
@pytest.mark.parametrize(("age", "expected"), [(29, 6), (30, 0)])
async def test_answers_age_by_the_servers_clock(
    on_redis: OnRedis,
    shared_redis: str,
    monkeypatch: pytest.MonkeyPatch,
    wrong_days: int,
    age: int,
    expected: int,
) -> None:
    """The proxy's own clock is wrong by weeks: what is fresh, and what the gauge shows, is by Redis's."""
    _, metrics, _, base = on_redis
    clock = StoreClock()
    opened = RedisStore(
        backend_for(create_client(shared_redis, timeout_seconds=2)),
        base_key=base,
        metrics=metrics,
        clock=clock,
    )
    guarded = ResilientStore(opened, metrics=metrics, freshness=FreshnessPolicy(ttl_days=30), clock=clock)
    day, wrong_seconds = today(), wrong_days * 86_400
    own = SimpleNamespace(time=lambda: time.time() + wrong_seconds, monotonic=time.monotonic)
    monkeypatch.setattr("services.cache_proxy.cache.store_clock.time", own)
    monkeypatch.setattr("services.cache_proxy.cache.entry.time", own)
    await opened.put({_digest(1): 6}, day=day - age)
    await opened.put({_digest(2): 5})
    assert [entry_level(entry) for entry in await guarded.get_entries([_digest(1), _digest(2)])] == [
        expected,
        5,
    ]
    assert list(await guarded.get_levels([_digest(1), _digest(2)])) == [expected, 5]
    assert clock.today() == day
    assert clock.difference_seconds() == pytest.approx(wrong_seconds, abs=5)
    await opened.close()


@pytest.mark.parametrize(
    ("ttl_days", "serve_stale", "age", "served"),
    [(0, False, 300, True), (30, False, 29, True), (30, False, 30, False), (30, True, 300, True)],
)
async def test_age_decides_whether_the_previous_version_is_served(
    on_redis: OnRedis, shared_redis: str, ttl_days: int, serve_stale: bool, age: int, served: bool
) -> None:
    """The previous version's answers age as this version's do, and none is ever fresh."""
    current, metrics, _, base = on_redis
    backend = backend_for(create_client(shared_redis, timeout_seconds=2))
    previous = RedisStore(backend, base_key=f"{base}previous:", metrics=metrics)
    lifetime = FreshnessPolicy(ttl_days, serve_stale)
    guarded = ResilientStore(VersionedStore(current, previous), metrics=metrics, freshness=lifetime)
    await previous.put({_digest(1): 6}, day=today() - age)
    [entry] = await guarded.get_entries([_digest(1)])
    assert entry_level(entry) == (6 if served else 0)
    assert not lifetime.is_fresh(entry, day=today())
    assert list(await guarded.get_levels([_digest(1)])) == [0]
    await previous.close()


async def test_scripts_that_the_server_forgot_are_loaded_again(on_redis: OnRedis) -> None:
    """A restart or SCRIPT FLUSH costs nobody an answer."""
    opened, _, client, _ = on_redis
    await opened.put({_digest(5): 1})
    client.script_flush()
    assert await _levels(opened, [_digest(5)]) == [1]
    client.script_flush()
    await opened.put({_digest(5): 2})
    assert await _levels(opened, [_digest(5)]) == [2]


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to stop and fill."""
    with redis_process(tmp_path) as server:
        yield server


@pytest.mark.slow
async def test_many_who_wait_for_a_silent_server_wait_once(own_redis: RedisServer) -> None:
    """Look-ups and writes for many calls of a script all fail with the first, which is tried twice."""
    opened = RedisStore(
        backend_for(create_client(own_redis.url, timeout_seconds=2)), base_key="p:", metrics=_metrics()
    )
    assert await _levels(opened, [_digest(1)]) == [0]
    own_redis.pause()
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    many = [_digest(number) for number in range(300)]
    gets, puts = (opened.get(many) for _ in range(100)), (opened.put({_digest(1): 1}) for _ in range(100))
    ended = await asyncio.gather(*gets, *puts, return_exceptions=True)
    assert all(isinstance(error, StoreError) for error in ended)
    assert loop.time() - started_at < 4 * 2  # as a second one would take
    own_redis.resume()
    assert await _levels(opened, [_digest(1)]) == [0]
    await opened.close()


async def test_a_full_server_refuses_and_keeps_answering(own_redis: RedisServer) -> None:
    """Out of memory under noeviction: writes are refused as such, look-ups go on, and what was not saved
    is written once there is room.
    """  # noqa: D205 - one thought
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
        guarded = ResilientStore(opened, metrics=metrics)
        stack.push_async_callback(guarded.close)
        await guarded.put({_digest(2): 6})
        assert list(await guarded.get_levels([_digest(1), _digest(2)])) == [4, 6]
        assert guarded.available
        client.config_set("maxmemory", "0")
        await _until_known(opened, {_digest(2): 6})


async def _until_known(store: AnswerStore, levels: dict[bytes, int]) -> None:
    """Poll until the store has these levels: the guard writes them as soon as it can."""
    async with asyncio.timeout(10):
        while await _levels(store, list(levels)) != list(levels.values()):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.05)


async def test_what_a_lost_server_missed_is_written_when_it_returns(own_redis: RedisServer) -> None:
    """Answers given while it was away are kept, served from memory, and saved."""
    opened = RedisStore(
        backend_for(create_client(own_redis.url, timeout_seconds=10)), base_key="lost:", metrics=_metrics()
    )
    guarded = ResilientStore(opened, metrics=_metrics())
    own_redis.kill()
    await guarded.put({_digest(number): number % 7 + 1 for number in range(50)})
    assert not guarded.available
    assert list(await guarded.get_levels([_digest(1), _digest(99)])) == [2, 0]
    own_redis.start()
    await _until_known(opened, {_digest(number): number % 7 + 1 for number in range(50)})
    await guarded.close()


async def test_what_was_invalidated_after_it_was_asked_is_taken_back(
    on_redis: OnRedis, backend: RedisBackend
) -> None:
    """By its tombstone, one pair or all; what was asked for after that stays; replicas are told."""
    opened, metrics, client, base = on_redis
    log = InvalidationLog(backend, f"{{{base}}}log")
    guarded = ResilientStore(opened, metrics=metrics, invalidation_log=log)
    asked_at = time.monotonic()
    await asyncio.sleep(0.01)
    for buried, left in ((_digest(1), 4), (b"", 0)):
        await backend.run_script(ADD_TOMBSTONES, [ScriptCall(f"{{{base}}}tombs", [buried])])
        await guarded.put({_digest(1): 3, _digest(2): 4}, requested_at=asked_at)
        assert await _levels(opened, [_digest(1), _digest(2)]) == [0, left]
    first = client.lrange(log.key, 0, 0)
    assert [entry[-16:] for entry in first] == [_digest(1)]
    await asyncio.sleep(0.01)
    await guarded.put({_digest(1): 3})
    assert await _levels(opened, [_digest(1)]) == [3]
    await guarded.close()


async def test_what_was_invalidated_before_a_lost_server_returned_is_taken_back(
    own_redis: RedisServer,
) -> None:
    """Answers that wait for the server are written when it is back, but for those with a later tombstone."""
    backend = backend_for(create_client(own_redis.url, timeout_seconds=10))
    opened = RedisStore(backend, base_key="lost:", metrics=_metrics())
    guarded = ResilientStore(
        opened, metrics=_metrics(), invalidation_log=InvalidationLog(backend, "{lost}log")
    )
    asked_at = time.monotonic()
    await asyncio.sleep(0.01)
    await backend.run_script(ADD_TOMBSTONES, [ScriptCall("{lost}tombs", [_digest(1)])])
    own_redis.kill()
    await guarded.put({_digest(1): 3, _digest(2): 4}, requested_at=asked_at)
    own_redis.start()
    await _until_known(opened, {_digest(1): 0, _digest(2): 4})
    await guarded.close()


@pytest.mark.parametrize(
    "old", ["garbage", "ab,9999999999999999,0;", "ab,-1,0;", "ab,8,0", "", "ab,8,99999999999;"]
)
async def test_garbage_in_place_of_what_is_left_over_is_dropped(on_redis: OnRedis, old: str) -> None:
    """Whoever waits until nothing is left over does not wait for ever."""
    opened, _, client, base = on_redis
    await opened.put({bytes(16): 4})
    client.hset(tag_state_key(base, 0), "old", old)
    more = [(await opened.sweep(0, buckets=100)).has_leftovers for _ in range(3)]
    assert not more[-1]
    assert not client.hexists(tag_state_key(base, 0), "old")
    assert await _levels(opened, [bytes(16)]) == [4]
