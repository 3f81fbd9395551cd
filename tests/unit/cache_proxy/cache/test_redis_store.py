"""The Redis store: growth, damaged data, deleted scripts and silent servers."""

import asyncio
import os
from collections.abc import Callable

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.cache_proxy.cache import cache_scripts
from services.cache_proxy.cache.buckets import FIELD_BYTES, TAGS, TagState, tag_for_digest
from services.cache_proxy.cache.entry import entry_level, today
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.errors import StoreError
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from services.cache_proxy.redis_keys import tag_state_key
from tests.support.answer_stores import (
    OnRedis,
    make_metrics,
    spread_digest,
    stored_bucket_key,
    stored_levels,
    stored_tag_state,
)
from tests.support.redis_server import RedisServer


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
    good = spread_digest(1)
    bad = spread_digest(2)
    await opened.put({good: 5, bad: 1})
    client.hset(stored_bucket_key(client, base, bad), bad[FIELD_BYTES], value)
    before = metrics.store_garbage._value.get()
    assert await stored_levels(opened, [good, bad]) == [5, 0]
    assert metrics.store_garbage._value.get() == before + 1
    await opened.put({bad: 2})
    assert await stored_levels(opened, [good, bad]) == [5, 2]


async def test_answer_with_future_day_is_garbage(on_redis: OnRedis) -> None:
    """A small number is not taken for an answer of a day far ahead; tomorrow is accepted."""
    opened, metrics, client, base = on_redis
    await opened.put({spread_digest(1): 5})
    for days, level in ((0, 5), (1, 5), (2, 0), (800, 0)):
        value = -4096 + (today() + days) * 7 + 4
        client.hset(
            stored_bucket_key(client, base, spread_digest(1)), spread_digest(1)[FIELD_BYTES], str(value)
        )
        assert [entry_level(entry) for entry in await opened.get([spread_digest(1)])] == [level]
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
    pairs = {spread_digest(number): number % 7 + 1 for number in range(400)}
    lost = {digest for digest in pairs if tag_for_digest(digest) == tag_for_digest(spread_digest(3))}
    await opened.put(pairs)
    damage(client, tag_state_key(base, tag_for_digest(spread_digest(3))))
    expected = {digest: 0 if digest in lost else level for digest, level in pairs.items()}
    assert await stored_levels(opened, list(pairs)) == list(expected.values())
    await opened.put({digest: pairs[digest] for digest in lost})
    assert await stored_levels(opened, list(pairs)) == list(pairs.values())


@pytest.mark.parametrize("kind", ["string", "list", "set"])
async def test_bucket_of_wrong_type_is_a_miss_and_is_replaced(on_redis: OnRedis, kind: str) -> None:
    """A key of another type under a bucket's name causes a miss and no error."""
    opened, metrics, client, base = on_redis
    await opened.put({spread_digest(3): 1})
    bucket = stored_bucket_key(client, base, spread_digest(3))
    client.delete(bucket)
    if kind == "string":
        client.set(bucket, "x")
    elif kind == "list":
        client.rpush(bucket, "x")
    else:
        client.sadd(bucket, "x")
    assert await stored_levels(opened, [spread_digest(3)]) == [0]
    assert metrics.store_garbage._value.get() == 1
    await opened.put({spread_digest(3): 6})
    assert await stored_levels(opened, [spread_digest(3)]) == [6]


async def test_cache_grows_by_single_buckets_that_stay_small(on_redis: OnRedis) -> None:
    """While the cache grows to 60,000 pairs, every stored pair is found.

    Each bucket is a listpack of at most 128 pairs (the smallest limit of any server's configuration), every
    tag grows with its pairs, and the pairs are counted.
    """
    opened, _, client, base = on_redis
    levels: dict[bytes, int] = {}
    for first in range(0, 60_000, 6_000):
        more = {spread_digest(number): number % 7 + 1 for number in range(first, first + 6_000)}
        await opened.put(more)
        levels |= more
        sample = list(levels)[:: 1 + first // 3000]
        assert await stored_levels(opened, sample) == [levels[digest] for digest in sample]
    assert await stored_levels(opened, list(levels)) == list(levels.values())
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
    bucket = stored_bucket_key(client, base, kept)
    client.hset(bucket, "short", "-1000")
    client.hset(bucket, kept[FIELD_BYTES], "nonsense")
    client.set(
        tag_state_key(base, 1) + stored_tag_state(client, base, kept).generation + ":4",
        "a bucket of another column",
    )
    await opened.put(levels)
    await opened.put({bytes((column,)) + os.urandom(15): 2 for column in (4, 6, 7) for _ in range(200)})
    assert metrics.store_garbage._value.get() >= 2
    assert await stored_levels(opened, list(levels)) == [3] * len(levels)
    assert not [key for key in client.scan_iter(f"{base}*") if client.type(key) != b"hash"]


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
                spread_digest(buckets * 11 + 1),
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
    digests = [spread_digest(number) for number in range(200)]
    for tag in range(TAGS):
        client.hset(tag_state_key(base, tag), mapping={"generation": "a", "buckets": buckets, "pairs": 0})
    for digest in digests:
        name = TagState("a", buckets).bucket_key(base, digest)
        client.hset(name, digest[FIELD_BYTES], str(-4096 + today() * 7 + 4))
    assert await stored_levels(opened, digests) == [5] * 200


async def test_scripts_are_loaded_again_after_script_flush(on_redis: OnRedis) -> None:
    """A restart or SCRIPT FLUSH of the server makes no operation fail."""
    opened, _, client, _ = on_redis
    await opened.put({spread_digest(5): 1})
    client.script_flush()
    assert await stored_levels(opened, [spread_digest(5)]) == [1]
    client.script_flush()
    await opened.put({spread_digest(5): 2})
    assert await stored_levels(opened, [spread_digest(5)]) == [2]


@pytest.mark.slow
async def test_operations_on_silent_server_share_one_timeout(own_redis: RedisServer) -> None:
    """All waiting look-ups and writes fail when the first one does, which is tried twice."""
    opened = RedisStore(
        backend_for(create_client(own_redis.url, timeout_seconds=2)), base_key="p:", metrics=make_metrics()
    )
    assert await stored_levels(opened, [spread_digest(1)]) == [0]
    own_redis.pause()
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    digests = [spread_digest(number) for number in range(300)]
    gets = (opened.get(digests) for _ in range(100))
    puts = (opened.put({spread_digest(1): 1}) for _ in range(100))
    outcomes = await asyncio.gather(*gets, *puts, return_exceptions=True)
    assert all(isinstance(outcome, StoreError) for outcome in outcomes)
    # A second operation with its retry would take until then.
    assert loop.time() - started_at < 4 * 2
    own_redis.resume()
    assert await stored_levels(opened, [spread_digest(1)]) == [0]
    await opened.close()
