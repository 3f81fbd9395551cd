"""Replicas of two queue formats on one Redis: who uses the shared queue, and what the others may do."""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import pytest

from services.cache_proxy.errors import QueueFormatError
from services.cache_proxy.queue.serialization import pack
from services.cache_proxy.redis_keys import FORMAT, QueueKeys
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
)

NEXT = FORMAT + 1
FIRST, SECOND, OTHER, ANOTHER = "0" * 15 + "1", "0" * 15 + "2", "a" * 16, "b" * 16
ARGUMENTS: dict[str, Sequence[Any]] = {
    "enqueue": [OTHER, 10, 10**6, 4, 1000, pack([])],
    "cancel": [OTHER, b"x" * 16, 0],
    "claim": [OTHER, f"{OTHER}.1", 0, 0, 4, 10**6, 0, 1000, 60, "", -1],
    "postpone_slot": [f"{FIRST}.1", 1],
    "release": [f"{FIRST}.1"],
    "complete": [f"{FIRST}.1", b"x" * 16 + b"\x01", pack([]), 1000, 1, OTHER],
    "fail": [f"{FIRST}.1", -1, pack([b"unavailable", b"", 1]), 1000, 1, 2, 2, 0, 0, 3, 3, 3],
    "reject": [f"{FIRST}.1", pack([b"nonsense", b""]), pack([]), 3, OTHER],
    "heartbeat": [OTHER, pack([]), "", 0, 1, 1, 4, pack([]), "", pack([])],
    "set_peer_state": [FIRST, "gone", 0],
    "snapshot": [1, 10, 100],
    "configure": [1, 1, 1],
    "reset": [],
}


def _location_of(url: str, *, queue_format: int = FORMAT, prefix: str | None = None) -> QueueLocation:
    prefix = prefix or QueueLocation.create(url).keys.limit.partition("}")[0].removeprefix("{")
    return QueueLocation(url, QueueKeys(prefix=prefix, namespace="n", queue_format=queue_format))


def _next_to(location: QueueLocation, queue_format: int = NEXT) -> QueueLocation:
    prefix = location.keys.limit.partition("}")[0].removeprefix("{")
    return _location_of(location.url, queue_format=queue_format, prefix=prefix)


def _dump(location: QueueLocation) -> dict[bytes, Any]:
    with location.client() as client:
        pattern = location.keys.limit.partition(":limit")[0].replace("{", "[{]").replace("}", "[}]")
        return {key: client.dump(key) for key in client.scan_iter(f"{pattern}*")}


def _format(location: QueueLocation) -> bytes | None:
    with location.client() as client:
        found: bytes | None = client.hget(location.keys.limit, "format")
        return found


async def _stand_by(*waiting: Replica, beside: Sequence[Replica] = (), seconds: float = 5) -> None:
    """Send heartbeats until all that wait are members, and silent for long enough to use their slots."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for replica in beside:
            await replica.heartbeat()
        for replica in waiting:
            assert not await replica.session._may_join()
        membership = [replica.failover._limiter._membership for replica in waiting]
        if all(
            found is not None
            and replica.name in found.members
            and replica.failover._limiter.not_before < time.monotonic()
            for found, replica in zip(membership, waiting, strict=True)
        ):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("never admitted")


def _replica(location: QueueLocation, name: str) -> Replica:
    return Replica(location, name, queue_limits(pairs_per_second=40))


async def test_every_script_of_another_format_writes_nothing(shared_redis: str) -> None:
    """Keep each byte of the records, claims, limit and membership, and name both formats."""
    location = _location_of(shared_redis)
    other = _replica(_next_to(location), OTHER)
    async with replicas(location) as (one,):
        await one.enqueue(numbered_pairs(range(6)))
        await one.claim_batch()
        before = _dump(location)
        assert set(ARGUMENTS) | {"standby"} == set(one.scripts._scripts)
        for name, arguments in ARGUMENTS.items():
            with pytest.raises(QueueFormatError) as caught:
                await other.scripts.run(name, arguments)
            assert (caught.value.found, caught.value.expected) == (FORMAT, NEXT)
            assert _dump(location) == before, name
    await other.close_connections()


async def test_queue_without_the_field_has_the_first_format(shared_redis: str) -> None:
    """Share the queue with a release that writes no format, and keep a later format out of it."""
    location = _location_of(shared_redis, queue_format=1)
    other = _replica(_next_to(location, 2), OTHER)
    async with replicas(location) as (one,):
        with location.client() as client:
            client.hdel(location.keys.limit, "format")
        await one.enqueue(numbered_pairs(range(3)))
        assert pair_numbers(await one.claim_batch()) == [0, 1, 2]
        with pytest.raises(
            QueueFormatError, match="format 1 use the shared queue, and this replica has format 2"
        ):
            await other.scripts.run("snapshot", ARGUMENTS["snapshot"])
        await one.heartbeat()
        assert _format(location) == b"1"
    await other.close_connections()


async def test_first_replica_of_a_deployment_sets_its_format(shared_redis: str) -> None:
    """Need no takeover where no other replica is, as after a flush."""
    location = _location_of(shared_redis, queue_format=NEXT)
    async with replicas(location) as (one,):
        assert _format(location) == str(NEXT).encode()
        await one.enqueue(numbered_pairs(range(3)))
        location.flush()
        await one.heartbeat()
        assert pair_numbers(await one.claim_batch()) == [0, 1, 2]
        assert _format(location) == str(NEXT).encode()


@pytest.mark.parametrize("garbage", [b"", b"0", b"-1", b"1.5", b"99999", b"x", b"nan"])
async def test_garbage_in_the_field_is_replaced(shared_redis: str, garbage: bytes) -> None:
    """Go on with the first format, and write it again."""
    location = _location_of(shared_redis)
    async with replicas(location) as (one,):
        with location.client() as client:
            client.hset(location.keys.limit, "format", garbage)
        await one.heartbeat()
        assert _format(location) == str(FORMAT).encode()


async def test_format_that_no_replica_has_is_replaced(shared_redis: str) -> None:
    """Take the queue back within two heartbeats when something wrote a format of no replica."""
    location = _location_of(shared_redis)
    async with replicas(location, 2) as fleet:
        with location.client() as client:
            client.hset(location.keys.limit, "format", "7")
        for replica in fleet:
            with pytest.raises(QueueFormatError):
                await replica.heartbeat()
        joined = [await replica.session._may_join() for replica in fleet * 2]
        assert joined[-1]
        await fleet[0].heartbeat()
        assert _format(location) == str(FORMAT).encode()


async def test_replica_that_stands_by_has_time_slots_of_its_own(shared_redis: str) -> None:
    """Be a silent member, and be admitted although another one is silent already."""
    location = _location_of(shared_redis)
    waiting = [_replica(_next_to(location), name) for name in (OTHER, ANOTHER)]
    async with replicas(location, bounds=queue_limits(pairs_per_second=40)) as (one,):
        for replica in waiting:
            await replica.failover.fail_over(QueueFormatError(found=FORMAT, expected=NEXT))
            assert replica.failover._limiter.wait_seconds(1, now=time.monotonic()) > 1
        await _stand_by(waiting[0], beside=[one])
        await _stand_by(*waiting, beside=[one])
        with location.client() as client:
            members = client.hget(location.keys.limit, "members")
            heartbeats = client.zrange(f"{location.keys.limit}:replicas", 0, -1, withscores=True)
            seconds, microseconds = client.time()
        silent_since = seconds * 1000 + microseconds / 1000 - 1000
        assert members == f"{one.name},{OTHER},{ANOTHER}".encode()
        assert all(score < silent_since for name, score in heartbeats if name != one.name.encode())
        waits = [replica.failover._limiter.wait_seconds(4, now=time.monotonic()) for replica in waiting]
        assert all(0 <= wait <= 3.5 for wait in waits)
        assert abs(waits[0] - waits[1]) > 0.05
    for replica in waiting:
        await replica.close_connections()


async def test_last_replica_of_a_format_that_leaves_hands_the_queue_over(shared_redis: str) -> None:
    """Change the format with the first heartbeat of a replica that stands by."""
    location = _location_of(shared_redis)
    other = _replica(_next_to(location), OTHER)
    async with replicas(location, 2, bounds=queue_limits(pairs_per_second=40)) as (one, two):
        await _stand_by(other, beside=[one, two])
        await one.scripts.run("set_peer_state", [one.name, "gone", 0])
        assert not await other.session._may_join()
        await two.scripts.run("set_peer_state", [two.name, "gone", 0])
        assert await other.session._may_join()
        await other.subscribe()
        assert _format(location) == str(NEXT).encode()
        with pytest.raises(QueueFormatError):
            await one.scripts.run("snapshot", ARGUMENTS["snapshot"])
        assert not await one.session._may_join()
    await other.close_connections()


@pytest.mark.slow
async def test_killed_replicas_hand_the_queue_over_after_three_seconds(shared_redis: str) -> None:
    """Take over only if the own heartbeats went on: after an outage all come back, in any order."""
    location = _location_of(shared_redis)
    other = _replica(_next_to(location), OTHER)
    async with replicas(location, bounds=queue_limits(pairs_per_second=40)) as (one,):
        await _stand_by(other, beside=[one])
        one.expire_heartbeat()
        with location.client() as client:
            client.hset(f"{location.keys.limit}:standby", OTHER, f"{NEXT}:{(client.time()[0] - 5) * 1000}")
        assert not await other.session._may_join()
        assert await other.session._may_join()
        assert _format(location) == str(NEXT).encode()
    await other.close_connections()


async def test_replica_that_stands_by_and_ends_leaves_nothing(shared_redis: str) -> None:
    """Leave the membership at once."""
    location = _location_of(shared_redis)
    other = _replica(_next_to(location), OTHER)
    async with replicas(location, bounds=queue_limits(pairs_per_second=40)) as (one,):
        await _stand_by(other, beside=[one])
        await other.session._run_standby(is_leaving=True)
        with location.client() as client:
            kept = client.zrange(f"{location.keys.limit}:replicas", 0, -1)
            assert kept == [one.name.encode()]
            assert not client.exists(f"{location.keys.limit}:standby")
    await other.close_connections()


async def test_other_format_is_logged_once(shared_redis: str, caplog: pytest.LogCaptureFixture) -> None:
    """Name what was found and expected, and what to do. Log once more when the queue is shared again."""
    caplog.set_level(logging.INFO)
    other = _replica(_location_of(shared_redis), OTHER)
    queue = other.failover
    stood_by = []
    for _ in range(3):
        await queue.fail_over(QueueFormatError(found=7, expected=FORMAT))
        stood_by.append(queue.is_on_standby)
    await other.subscribe()
    stood_by.append(queue.is_on_standby)
    assert stood_by == [True, True, True, False]
    lost, back = (record.getMessage() for record in caplog.records)
    assert lost == (
        f"replicas of queue format 7 use the shared queue, and this replica has format {FORMAT}: "
        "it uses a local queue, within its share of the rate limit, and joins when no replica of "
        "format 7 is left (finish the update, or roll it back)"
    )
    assert back == "the shared queue is back"
    await other.close_connections()


async def test_replica_that_stands_by_follows_invalidations(shared_redis: str) -> None:
    """Pass on the last entry of each log with every heartbeat."""
    location = _location_of(shared_redis)
    other = _replica(_next_to(location), OTHER)
    received: list[bytes | None] = []

    async def receive(last: bytes | None) -> None:
        received.append(last)

    other.session._log_callbacks = {other.location.keys.invalidation_log: receive}
    assert other.location.keys.invalidation_log == location.keys.invalidation_log
    async with replicas(location) as (one,):
        assert not await other.session._may_join()
        with location.client() as client:
            client.rpush(location.keys.invalidation_log, b"entry")
        assert not await other.session._may_join()
        await one.heartbeat()
    assert received == [None, b"entry"]
    await other.close_connections()
