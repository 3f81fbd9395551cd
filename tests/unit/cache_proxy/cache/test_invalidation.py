"""The log by which every replica forgets what was invalidated, whatever becomes of the log."""

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

_A, _B = b"a" * 16, b"b" * 16
_ALL = b"all"


def _follow(log: InvalidationLog) -> tuple[InvalidationFollower, list[bytes]]:
    """A follower that has seen the log as it is, and what it is told from now on."""
    told: list[bytes] = []
    return InvalidationFollower(log, remove=told.append, clear=lambda: told.append(_ALL)), told


async def test_a_reader_is_told_each_invalidation_once_and_in_order(reached: RedisBackend, base: str) -> None:
    """Pairs one by one and all at once; nothing twice; each reader by itself."""
    log = InvalidationLog(reached, f"{base}log")
    await log.add([_A])
    follower, told = _follow(log)
    await follower.poll()
    told.clear()  # it began in the middle, so it forgot what it did not have
    await follower.poll()
    assert told == []
    await log.add([_A, _B])
    await log.add_all()
    await follower.poll()
    await follower.poll()
    assert told == [_A, _B, _ALL]


async def test_a_running_reader_is_told_within_a_second(reached: RedisBackend, base: str) -> None:
    """As the contract says, whenever it looked last."""
    log = InvalidationLog(reached, f"{base}log")
    told = asyncio.Event()
    follower = InvalidationFollower(log, remove=lambda _: told.set(), clear=told.set)
    await log.add([_B])
    task = asyncio.create_task(follower.run())
    for digest in (_A, _B):  # it has just looked: when it began, and when it told of the one before
        await asyncio.wait_for(told.wait(), 1)
        told.clear()
        await log.add([digest])
    await asyncio.wait_for(told.wait(), 1)
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
    ids=["flush", "rolled back", "rolled back and on", "made anew", "emptied", "too much to read", "garbage"],
)
async def test_a_gap_makes_a_reader_forget_everything(
    reached: RedisBackend, base: str, shared_redis: str, loss: Callable[["redis.Redis", str], Any]
) -> None:
    """A log that lost its end, or all, or ran away: whatever may have been missed is not served any more."""
    log = InvalidationLog(reached, f"{base}log")
    await log.add([_A])
    follower, told = _follow(log)
    await follower.poll()
    told.clear()
    with redis.Redis.from_url(shared_redis) as client:
        loss(client, log.key)
    await follower.poll()
    assert told[0] == _ALL
    told.clear()
    await follower.poll()
    assert told == []


async def test_what_stood_in_a_log_only_between_two_looks_is_missed_by_nobody(
    reached: RedisBackend, base: str, shared_redis: str
) -> None:
    """Empty, filled and flushed between two looks, a log makes its reader forget; a mark alone does not."""
    log = InvalidationLog(reached, f"{base}log")
    (follower, told), (other, told_other) = _follow(log), _follow(log)
    for _ in range(2):
        await follower.on_log_tail(None)
        await other.on_log_tail(None)
    told.clear()
    told_other.clear()
    await log.add_marker()
    await other.poll()
    assert told_other == []
    await log.add([_A])
    with redis.Redis.from_url(shared_redis) as client:
        client.delete(log.key)
    await follower.on_log_tail(None)
    assert told == [_ALL]


async def test_a_log_of_a_wrong_type_is_garbage(reached: RedisBackend, base: str, shared_redis: str) -> None:
    """The reader forgets everything and goes on; the next invalidation makes the log anew."""
    log = InvalidationLog(reached, f"{base}log")
    with redis.Redis.from_url(shared_redis) as client:
        client.set(log.key, "x")
        follower, told = _follow(log)
        task = asyncio.create_task(follower.run())
        async with asyncio.timeout(5):
            while not told:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            told.clear()
            await log.add([_A])
            while not told:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        await cancel_and_wait([task])
        assert client.type(log.key) == b"list"
        client.set(log.key, "x")
        told.clear()
        for _ in range(3):
            await follower.poll()
        assert told == [_ALL]  # once: until somebody invalidates, nobody has to begin anew again


async def test_the_log_is_bounded(reached: RedisBackend, base: str, shared_redis: str) -> None:
    """However much is invalidated, it keeps the last ten thousand."""
    log = InvalidationLog(reached, f"{base}log")
    for _ in range(11):
        await log.add([_A] * 1000)
    with redis.Redis.from_url(shared_redis) as client:
        assert client.llen(log.key) == 10_000


async def test_a_tombstone_is_left_beside_the_queue(
    reached: RedisBackend, base: str, shared_redis: str
) -> None:
    """With the time, for the queue to compare with when a pair was claimed; what is of late goes too."""
    key = f"{{{base}}}tombs"
    with redis.Redis.from_url(shared_redis) as client:
        seconds, _ = client.time()
        for minute in (-1, 0, 1):  # the minute may end in between
            client.hset(f"{{{base}}}recent:{seconds // 60 + minute}", mapping={_A: 1, _B: 2})
        await reached.run_script(ADD_TOMBSTONES, [ScriptCall(key, [_A])])
        assert client.zrange(key, 0, -1) == [_A]
        assert abs(float(client.zscore(key, _A) or 0) - seconds * 1000) < 5000
        assert 0 < client.pttl(key) <= 86_400_000
        recent = f"{{{base}}}recent:{int(client.time()[0]) // 60}"
        assert client.hkeys(recent) == [_B]
        await reached.run_script(ADD_TOMBSTONES, [ScriptCall(key, [b""])])
        assert set(client.zrange(key, 0, -1)) == {_A, b"*"}
        assert not client.exists(recent)


@pytest.mark.parametrize("score", [float("inf"), float("-inf"), 1e300, -1.0])
async def test_tombstone_that_cannot_be_one_takes_no_answer_back(
    reached: RedisBackend, base: str, shared_redis: str, score: float
) -> None:
    """A time that is days ahead would have every answer forgotten as soon as it is stored."""
    key = f"{{{base}}}tombs"
    log = InvalidationLog(reached, f"{{{base}}}log")
    with redis.Redis.from_url(shared_redis) as client:
        client.zadd(key, {b"*": score, _A: score})
        assert await log.invalidated_since([_A, _B], since_monotonic=time.monotonic() - 1) == []
        await reached.run_script(ADD_TOMBSTONES, [ScriptCall(key, [_B])])
        assert await log.invalidated_since([_A, _B], since_monotonic=time.monotonic() - 10) == [_B]
        assert client.zscore(key, "*") in {None, -1.0}


@pytest.mark.parametrize("which", ["tombs", "recent:", "refused:"])
async def test_garbage_beside_the_queue_keeps_nobody_from_burying(
    reached: RedisBackend, base: str, shared_redis: str, which: str
) -> None:
    """What has a wrong type is dropped, and the tombstone stands."""
    key = f"{{{base}}}tombs"
    with redis.Redis.from_url(shared_redis) as client:
        seconds, _ = client.time()
        names = [which]
        if which != "tombs":
            names = [f"{which}{seconds // period + more}" for period in (60, 600) for more in (-1, 0, 1)]
        for name in names:
            client.set(f"{{{base}}}{name}", "garbage")
        assert await reached.run_script(ADD_TOMBSTONES, [ScriptCall(key, [_A])]) == [b"OK"]
        assert client.zrange(key, 0, -1) == [_A]
