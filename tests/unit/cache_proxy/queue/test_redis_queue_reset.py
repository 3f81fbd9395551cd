"""Tests of the reset of the shared queue after scripts failed on its data."""

import asyncio
from typing import Any

import pytest
import redis

from services.cache_proxy.errors import StoreAccessDeniedError, StoreDamagedError, StoreError
from tests.support.replicas import (
    QueueLocation,
    numbered_pairs,
    pair_numbers,
    replicas,
)

# They start and stop real servers, and run many examples.
pytestmark = pytest.mark.slow


async def test_queue_is_reset_once_for_failure_that_reset_does_not_repair(
    shared_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that still fails resets the queue again only after it has succeeded once."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        command, failing, repairs = replica.scripts._node.command, True, 0
        claim_sha = replica.scripts._scripts["claim"].sha
        reset_sha = replica.scripts._scripts["reset"].sha

        async def fail(*words: Any) -> Any:
            nonlocal repairs
            repairs += words[1] == reset_sha
            if failing and words[1] == claim_sha:
                message = "WRONGTYPE Operation against a key holding the wrong kind of value"
                raise StoreError(message) from redis.ResponseError(message)
            return await command(*words)

        monkeypatch.setattr(replica.scripts._node, "command", fail)
        await replica.enqueue(numbered_pairs(range(3)))
        for _ in range(5):
            with pytest.raises(StoreDamagedError):
                await replica.queue.claim()
            await replica.heartbeat()
        assert repairs == 1
        failing = False
        await replica.queue.re_enqueue()
        assert pair_numbers(await replica.claim_batch()) == [0, 1, 2]
        failing = True
        with pytest.raises(StoreDamagedError):
            await replica.queue.claim()
        assert repairs == 2


async def test_damage_found_by_concurrent_scripts_is_reset_once(shared_redis: str) -> None:
    """None of them fails: they wait for the one that resets the queue, so the replica does not fail over."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs(range(3)))
        for turn in range(3):
            with place.client() as client:
                client.set(f"{place.keys.base}meta", b"garbage")
            await asyncio.gather(*(replica.session._heartbeat() for _ in range(4)))
            assert replica.metrics.store_garbage._value.get() == turn + 1
        await replica.queue.re_enqueue()
        assert pair_numbers(await replica.claim_batch()) == [0, 1, 2]


async def test_queue_is_reset_for_one_script_while_another_keeps_failing(
    shared_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heartbeat that finds damage repairs it although claims keep failing."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        command = replica.scripts._node.command
        claim_sha = replica.scripts._scripts["claim"].sha

        async def fail(*words: Any) -> Any:
            if words[1] == claim_sha:
                message = "WRONGTYPE Operation against a key holding the wrong kind of value"
                raise StoreError(message) from redis.ResponseError(message)
            return await command(*words)

        monkeypatch.setattr(replica.scripts._node, "command", fail)
        await replica.enqueue(numbered_pairs(range(3)))
        with pytest.raises(StoreDamagedError):
            await replica.queue.claim()
        await replica.heartbeat()
        with place.client() as client:
            client.set(f"{place.keys.base}meta", b"garbage")
        await replica.heartbeat()


@pytest.mark.parametrize(
    "words",
    [
        "NOPERM User app has no permissions to run the 'publish' command",
        "ERR ACL failure in script: User app has no permissions to run the 'publish' command",
        "ERR Unknown Redis command called from script script: 1, on @user_script:400.",
        "ERR unknown command 'EVALSHA', with args beginning with:",
        "OOM command not allowed when used memory > 'maxmemory'. script: 1, on @user_script:9.",
        "BUSY Redis is busy running a script.",
        "MISCONF Redis is configured to save RDB snapshots script: 1, on @user_script:9.",
        "NOREPLICAS Not enough good replicas to write. script: 1, on @user_script:9.",
        "ERR an error of no known kind script: 1, on @user_script:9.",
    ],
)
async def test_server_state_never_resets_queue(
    words: str, shared_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only errors that data causes do: one replica must not delete the queue of all."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as (replica,):
        await replica.enqueue(numbered_pairs(range(3)))
        sent = []

        async def refuse(*command: Any) -> Any:
            sent.append(command[1])
            raise StoreError(words) from redis.ResponseError(words)

        monkeypatch.setattr(replica.scripts._node, "command", refuse)
        with pytest.raises(StoreError) as raised:
            await replica.queue.claim()
        assert replica.scripts._scripts["reset"].sha not in sent
        refused = any(name in words for name in ("NOPERM", "ACL", "nknown"))
        assert isinstance(raised.value, StoreAccessDeniedError) is refused
        monkeypatch.undo()
        assert pair_numbers(await replica.claim_batch()) == [0, 1, 2]
