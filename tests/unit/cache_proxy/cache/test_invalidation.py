"""The log of invalidations, and what a follower does when entries of the log are lost."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from services.cache_proxy.cache.cache_scripts import ADD_TOMBSTONES
from services.cache_proxy.cache.invalidation import InvalidationFollower, InvalidationLog
from services.cache_proxy.redis_client.backend import RedisBackend, ScriptCall
from services.common.tasks import cancel_and_wait

_A = b"a" * 16
_B = b"b" * 16
_ALL = b"all"


def _follow(log: InvalidationLog) -> tuple[InvalidationFollower, list[bytes]]:
    """Return a follower, and the list to which it appends what it removes: digests or `_ALL`."""
    removed: list[bytes] = []
    return InvalidationFollower(log, remove=removed.append, clear=lambda: removed.append(_ALL)), removed


async def test_follower_applies_each_invalidation_once_and_in_order(backend: RedisBackend, base: str) -> None:
    """Single pairs and all pairs at once are applied; a second poll applies nothing."""
    log = InvalidationLog(backend, f"{base}log")
    await log.add([_A])
    follower, removed = _follow(log)
    await follower.poll()
    # The follower began in the middle of the log, so it cleared everything.
    removed.clear()
    await follower.poll()
    assert removed == []
    await log.add([_A, _B])
    await log.add_all()
    await follower.poll()
    await follower.poll()
    assert removed == [_A, _B, _ALL]


async def test_running_follower_applies_invalidation_within_a_second(
    backend: RedisBackend, base: str
) -> None:
    """The bound of the contract holds, whenever the last poll was."""
    log = InvalidationLog(backend, f"{base}log")
    applied = asyncio.Event()
    follower = InvalidationFollower(log, remove=lambda _: applied.set(), clear=applied.set)
    await log.add([_B])
    task = asyncio.create_task(follower.run())
    # Each entry is added right after a poll, the longest time before the next one.
    for digest in (_A, _B):
        await asyncio.wait_for(applied.wait(), 1)
        applied.clear()
        await log.add([digest])
    await asyncio.wait_for(applied.wait(), 1)
    await cancel_and_wait([task])


@pytest.mark.parametrize(
    "loss",
    [
        lambda client, key: client.delete(key),
        lambda client, key: client.rpop(key),
        lambda client, key: (client.rpop(key), client.rpush(key, b"12345678" + _B)),
        lambda client, key: (client.delete(key), client.rpush(key, b"12345678" + _B)),
        lambda client, key: client.ltrim(key, 1, 0),
        lambda client, key: client.rpush(key, *[b"%08d" % number + _B for number in range(1000)]),
        lambda client, key: client.rpush(key, "garbage"),
    ],
    ids=["flush", "rolled back", "rolled back and on", "recreated", "emptied", "too much to read", "garbage"],
)
async def test_gap_in_log_makes_follower_clear_everything(
    backend: RedisBackend, base: str, shared_redis: str, loss: Callable[["redis.Redis", str], Any]
) -> None:
    """The log lost its end or everything, or grew too fast: no pair that may be invalid is served."""
    log = InvalidationLog(backend, f"{base}log")
    await log.add([_A])
    follower, removed = _follow(log)
    await follower.poll()
    removed.clear()
    with redis.Redis.from_url(shared_redis) as client:
        loss(client, log.key)
    await follower.poll()
    assert removed[0] == _ALL
    removed.clear()
    await follower.poll()
    assert removed == []


async def test_entry_that_was_in_log_only_between_two_polls_is_not_missed(
    backend: RedisBackend, base: str, shared_redis: str
) -> None:
    """A log that was filled and flushed between two polls makes the follower clear; a marker does not."""
    log = InvalidationLog(backend, f"{base}log")
    follower, removed = _follow(log)
    other, removed_by_other = _follow(log)
    for _ in range(2):
        await follower.on_log_tail(None)
        await other.on_log_tail(None)
    removed.clear()
    removed_by_other.clear()
    await log.add_marker()
    await other.poll()
    assert removed_by_other == []
    await log.add([_A])
    with redis.Redis.from_url(shared_redis) as client:
        client.delete(log.key)
    await follower.on_log_tail(None)
    assert removed == [_ALL]


async def test_log_of_wrong_type_is_replaced(backend: RedisBackend, base: str, shared_redis: str) -> None:
    """The follower clears everything once and continues; the next invalidation creates the log again."""
    log = InvalidationLog(backend, f"{base}log")
    with redis.Redis.from_url(shared_redis) as client:
        client.set(log.key, "x")
        follower, removed = _follow(log)
        task = asyncio.create_task(follower.run())
        async with asyncio.timeout(5):
            while not removed:  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.01)
            removed.clear()
            await log.add([_A])
            while not removed:  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.01)
        await cancel_and_wait([task])
        assert client.type(log.key) == b"list"
        client.set(log.key, "x")
        removed.clear()
        for _ in range(3):
            await follower.poll()
        # Once: until the next invalidation, there is nothing new to clear.
        assert removed == [_ALL]


async def test_log_keeps_last_ten_thousand_entries(
    backend: RedisBackend, base: str, shared_redis: str
) -> None:
    """Older entries are dropped, however many pairs are invalidated."""
    log = InvalidationLog(backend, f"{base}log")
    for _ in range(11):
        await log.add([_A] * 1000)
    with redis.Redis.from_url(shared_redis) as client:
        assert client.llen(log.key) == 10_000


async def test_tombstone_records_time_and_removes_recent_outcomes(
    backend: RedisBackend, base: str, shared_redis: str
) -> None:
    """The queue compares the time with that of a claim; remembered outcomes of the pair are deleted."""
    key = f"{{{base}}}tombs"
    with redis.Redis.from_url(shared_redis) as client:
        seconds, _ = client.time()
        # The minute may end in between.
        for minute in (-1, 0, 1):
            client.hset(f"{{{base}}}recent:{seconds // 60 + minute}", mapping={_A: 1, _B: 2})
        await backend.run_script(ADD_TOMBSTONES, [ScriptCall(key, [_A])])
        assert client.zrange(key, 0, -1) == [_A]
        assert abs(float(client.zscore(key, _A) or 0) - seconds * 1000) < 5000
        assert 0 < client.pttl(key) <= 86_400_000
        recent = f"{{{base}}}recent:{int(client.time()[0]) // 60}"
        assert client.hkeys(recent) == [_B]
        await backend.run_script(ADD_TOMBSTONES, [ScriptCall(key, [b""])])
        assert set(client.zrange(key, 0, -1)) == {_A, b"*"}
        assert not client.exists(recent)


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), 1e300, -1.0])
async def test_tombstone_with_impossible_time_deletes_no_answer(
    backend: RedisBackend, base: str, shared_redis: str, score: float
) -> None:
    """A time days ahead would delete every answer as soon as it is stored."""
    key = f"{{{base}}}tombs"
    log = InvalidationLog(backend, f"{{{base}}}log")
    with redis.Redis.from_url(shared_redis) as client:
        client.zadd(key, {b"*": score, _A: score})
        assert await log.invalidated_since([_A, _B], since_monotonic=time.monotonic() - 1) == []
        await backend.run_script(ADD_TOMBSTONES, [ScriptCall(key, [_B])])
        assert await log.invalidated_since([_A, _B], since_monotonic=time.monotonic() - 10) == [_B]
        assert client.zscore(key, "*") in {None, -1.0}


@pytest.mark.parametrize("which", ["tombs", "recent:", "refused:"])
async def test_garbage_beside_queue_does_not_prevent_tombstones(
    backend: RedisBackend, base: str, shared_redis: str, which: str
) -> None:
    """A key of a wrong type is deleted, and the tombstone is added."""
    key = f"{{{base}}}tombs"
    with redis.Redis.from_url(shared_redis) as client:
        seconds, _ = client.time()
        names = [which]
        if which != "tombs":
            names = [f"{which}{seconds // period + more}" for period in (60, 600) for more in (-1, 0, 1)]
        for name in names:
            client.set(f"{{{base}}}{name}", "garbage")
        assert await backend.run_script(ADD_TOMBSTONES, [ScriptCall(key, [_A])]) == [b"OK"]
        assert client.zrange(key, 0, -1) == [_A]
