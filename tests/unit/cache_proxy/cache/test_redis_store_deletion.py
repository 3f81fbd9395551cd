"""What removes answers from the Redis store: age, deletion, clearing and the sweep."""

import os

import pytest

from services.cache_proxy.cache.buckets import TAGS
from services.cache_proxy.cache.entry import entry_level, pack_entry, today
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.redis_keys import tag_state_key
from tests.support.answer_stores import OnRedis, spread_digest, stored_bucket_key, stored_levels


async def test_put_with_day_keeps_newer_answers(on_redis: OnRedis) -> None:
    """An answer keeps the day with which it was written; an older answer never replaces a newer one."""
    opened, _, _, _ = on_redis
    await opened.put({spread_digest(1): 5}, day=today() - 10)
    assert list(await opened.get([spread_digest(1)])) == [pack_entry(5, today() - 10)]
    await opened.put({spread_digest(1): 4}, day=today() - 3)
    await opened.put({spread_digest(1): 3}, day=today() - 4)
    assert list(await opened.get([spread_digest(1)])) == [pack_entry(4, today() - 3)]
    await opened.put({spread_digest(1): 2})
    await opened.put({spread_digest(1): 1}, day=today() - 1)
    assert list(await opened.get([spread_digest(1)])) == [pack_entry(2, today())]


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
    old = {spread_digest(number): number % 7 + 1 for number in range(3000)}
    young = {spread_digest(number): number % 7 + 1 for number in range(3000, 5000)}
    await opened.put(old, day=today() - 30)
    await opened.put(young, day=today() - 29)
    client.hset(stored_bucket_key(client, base, spread_digest(4000)), "garbage", "x")
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
    await opened.put({spread_digest(number): 4 for number in range(100)})
    assert await opened.delete([spread_digest(7), spread_digest(8), spread_digest(1000)]) == 2
    assert await stored_levels(opened, [spread_digest(number) for number in range(10)]) == [4] * 7 + [0, 0, 4]


async def test_delete_of_many_pairs_takes_several_calls(on_redis: OnRedis) -> None:
    """A thousand pairs are deleted by calls that occupy Redis no longer than a write does."""
    opened, _, client, _ = on_redis
    levels = {spread_digest(number): 3 for number in range(1000)}
    await opened.put(levels)
    before = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert await opened.delete(list(levels)) == 1000
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] - before >= 3
    assert not any(await opened.get(list(levels)))


async def test_clear_is_immediate_and_sweep_frees_memory(on_redis: OnRedis) -> None:
    """After `clear` every pair is a miss, new pairs are stored, and the sweep removes the old buckets."""
    opened, _, client, base = on_redis
    await opened.put({spread_digest(number): 4 for number in range(5000)})
    assert await opened.clear() == 5000
    assert not any(await opened.get([spread_digest(number) for number in range(5000)]))
    await opened.put({spread_digest(1): 2})
    # The second generation begins within the same minute as the first.
    assert await opened.clear() == 1
    await opened.put({spread_digest(1): 3})
    await _sweep(opened)
    assert await stored_levels(opened, [spread_digest(1), spread_digest(2)]) == [3, 0]
    assert len([key for key in client.scan_iter(f"{base}{{*}}?*") if client.hlen(key)]) == 1


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
    assert await stored_levels(opened, [bytes(16)]) == [4]
