"""The note of how a deployment's keys are made, the housekeeping beside the store, and model versions."""

import asyncio
import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from prometheus_client import CollectorRegistry

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.buckets import TAGS
from services.cache_proxy.cache.entry import (
    FROM_PREVIOUS_VERSION,
    FreshnessPolicy,
    entry_level,
    pack_entry,
    today,
)
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.cache.store_factory import open_store
from services.cache_proxy.cache.sweeper import Sweeper
from services.cache_proxy.config.cache_settings import AnswerSettings, CacheSettings, KeySettings
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import RedisBackend
from services.common.errors import UsageError
from services.common.tasks import cancel_and_wait


async def test_commands_are_told_which_setting_is_not_the_deployments(
    reached: RedisBackend, base: str, tmp_path: Path
) -> None:
    """Prefix, version, normal form and secret: each that differs is named, and what is right passes."""
    secret, other = tmp_path / "secret", tmp_path / "other"
    secret.write_bytes(b"s3cret")
    other.write_bytes(b"another")
    key = KeySettings(key_prefix=base, key_secret_file=str(secret), model_version="7")
    with pytest.raises(UsageError, match="--key-prefix"):
        await namespace.verify(reached, key)
    await namespace.verify(reached, key, allow_new=True)
    assert await namespace.register(reached, key) is None
    await namespace.verify(reached, key)
    for changed, flag in (
        ({"model_version": "8"}, "--model-version 8: the deployment knows only 7"),
        ({"normalize": "exact"}, "--normalize exact"),
        ({"key_secret_file": None}, "--key-secret-file"),
        ({"key_secret_file": str(other)}, "--key-secret-file"),
    ):
        with pytest.raises(UsageError, match=flag):
            await namespace.verify(reached, replace(key, **changed))


async def test_the_note_holds_no_secret_and_the_newest_start_counts(
    reached: RedisBackend, base: str, shared_redis: str, tmp_path: Path
) -> None:
    """What is stored is a hash of the secret; a start with other settings is told what they were before."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"hunter2")
    key = KeySettings(key_prefix=base, key_secret_file=str(secret))
    await namespace.register(reached, key)
    before = await namespace.register(reached, replace(key, normalize="exact"))
    assert before is not None
    assert before.normalize == "fold"
    with pytest.raises(UsageError, match="made with exact"):
        await namespace.verify(reached, key)
    with redis.Redis.from_url(shared_redis) as client:
        assert b"hunter2" not in b"".join(client.hvals(f"{base}:made"))


@pytest.mark.parametrize(
    "junk", [b"", b"\xff garbage", b"fold 1", b"fold %s none" % (b"9" * 5000), b"fold x y"]
)
async def test_damaged_note_is_replaced_by_the_settings(
    junk: bytes, reached: RedisBackend, base: str, shared_redis: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A command and a replica alike take it for absent, say so once, and write their own."""
    key = KeySettings(key_prefix=base)
    with redis.Redis.from_url(shared_redis) as client:
        for repair in (namespace.verify, namespace.register):
            client.hset(f"{base}:made", "1", junk)
            await repair(reached, key)
            assert client.hget(f"{base}:made", "1") == b"fold 1 none"
            await namespace.verify(reached, key)
    assert len(caplog.records) == 2


async def test_housekeeping_leaves_the_note_and_warns_of_another(
    redis_store: RedisStore, reached: RedisBackend, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy that starts tells the commands how it makes keys, and its operator if that has changed."""
    key = KeySettings(key_prefix=base)
    for settings, warnings in ((key, 0), (key, 0), (replace(key, normalize="exact"), 1)):
        caplog.clear()
        housekeeping = Sweeper(reached, redis_store, key_settings=settings, freshness=FreshnessPolicy())
        task = asyncio.create_task(housekeeping.run())
        async with asyncio.timeout(5):
            while not await _checks(reached, settings):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        await cancel_and_wait([task])
        assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == warnings


async def test_housekeeping_outlives_the_secrets_file(
    redis_store: RedisStore, reached: RedisBackend, base: str, tmp_path: Path
) -> None:
    """The file is gone when Redis can first be reached: what was read at the start counts."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    secret.chmod(0o600)
    key = KeySettings(key_prefix=base, key_secret_file=str(secret))
    housekeeping = Sweeper(reached, redis_store, key_settings=key, freshness=FreshnessPolicy())
    secret.unlink()
    task = asyncio.create_task(housekeeping.run())
    async with asyncio.timeout(5):
        while await reached.execute(f"{base}:made", "HLEN", f"{base}:made") == 0:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
    await cancel_and_wait([task])


async def test_housekeeping_that_fails_unforeseen_is_logged_and_begins_again(
    shared_redis: str, base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It never ends silently."""
    again = asyncio.Event()

    async def fail(_self: Sweeper) -> None:
        again.set()
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(Sweeper, "run", fail)
    cache = CacheSettings(cache_url=shared_redis)
    async with open_store(cache, KeySettings(key_prefix=base), ProxyMetrics(CollectorRegistry())):
        async with asyncio.timeout(5):
            await again.wait()
            while "begins anew" not in caplog.text:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)


async def _checks(reached: RedisBackend, key: KeySettings) -> bool:
    try:
        await namespace.verify(reached, key)
    except UsageError:
        return False
    return True


async def test_housekeeping_leaves_the_note_again_after_a_flush(
    redis_store: RedisStore, reached: RedisBackend, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands find a deployment that runs, whatever Redis has lost."""
    monkeypatch.setattr("services.cache_proxy.cache.sweeper._IDLE_INTERVAL_SECONDS", 0.01)
    key = KeySettings(key_prefix=base)
    task = asyncio.create_task(
        Sweeper(reached, redis_store, key_settings=key, freshness=FreshnessPolicy()).run()
    )
    async with asyncio.timeout(5):
        for _ in range(2):
            while not await _checks(reached, key):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
            await reached.execute(f"{base}:made", "UNLINK", f"{base}:made")
    await cancel_and_wait([task])


async def test_a_replica_whose_clock_is_wrong_drops_nothing(
    redis_store: RedisStore, reached: RedisBackend, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty days ahead, with answers kept for thirty: Redis's clock decides."""
    digest = bytes(16)
    await redis_store.put({digest: 5})
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 40 * 86_400)
    lifetime = FreshnessPolicy(ttl_days=30)
    await Sweeper(reached, redis_store, key_settings=KeySettings(key_prefix=base), freshness=lifetime).step(0)
    assert (await redis_store.get([digest]))[0]


@pytest.mark.parametrize(("serve_stale", "kept"), [(False, [29]), (True, [29, 30, 59])])
async def test_housekeeping_drops_what_is_not_answered_any_more(
    redis_store: RedisStore, reached: RedisBackend, base: str, serve_stale: bool, kept: list[int]
) -> None:
    """At the end of its time an answer leaves; one that is served stale has its time once more."""
    ages = [29, 30, 59, 60, 300]
    digests = {age: bytes((age % 256,)) + bytes(15) for age in ages}
    for age, digest in digests.items():
        await redis_store.put({digest: 5}, day=today() - age)
    lifetime = FreshnessPolicy(ttl_days=30, serve_stale=serve_stale)
    housekeeping = Sweeper(
        reached, redis_store, key_settings=KeySettings(key_prefix=base), freshness=lifetime
    )
    for tag in range(TAGS):
        await housekeeping.step(tag)
    entries = await redis_store.get(list(digests.values()))
    assert [age for age, entry in zip(ages, entries, strict=True) if entry] == kept


async def test_the_previous_versions_answers_are_served_until_there_are_own_ones(
    shared_redis: str, base: str
) -> None:
    """Known of the previous version alone: served, marked as not fresh; once inferred again, the new one is.
    Going back to the previous version finds its own answers as they were.
    """  # noqa: D205 - one thought
    cache, one = CacheSettings(cache_url=shared_redis), KeySettings(key_prefix=base)
    two = replace(one, model_version="2")
    metrics = ProxyMetrics(CollectorRegistry())
    digests = [bytes((number,)) * 16 for number in range(3)]
    async with open_store(cache, one, metrics) as opened:
        await opened.store.put({digests[0]: 3, digests[1]: 4})
        await opened.store.close()
    async with open_store(cache, two, metrics, AnswerSettings(previous_model_version="1")) as opened:
        assert len(opened.invalidation_logs) == 2
        guarded = ResilientStore(opened.store, metrics=metrics)
        await guarded.put({digests[0]: 6})
        entries = await guarded.get_entries(digests)
        assert [entry_level(entry) for entry in entries] == [6, 4, 0]
        assert [bool(entry & FROM_PREVIOUS_VERSION) for entry in entries] == [False, True, False]
        assert await guarded.get_levels(digests) == [6, 0, 0]
        await opened.store.delete([digests[1]])
        assert not (await guarded.get_entries(digests))[1]
        await guarded.close()
    async with open_store(cache, one, metrics) as opened:
        assert list(await opened.store.get(digests)) == [pack_entry(3, today()), 0, 0]
        await opened.store.close()


async def test_a_note_of_a_wrong_type_is_made_anew(
    reached: RedisBackend, base: str, shared_redis: str
) -> None:
    """To a command it is no deployment at all, and the next start leaves its note."""
    key = KeySettings(key_prefix=base)
    with redis.Redis.from_url(shared_redis) as client:
        client.set(f"{base}:made", "garbage")
        with pytest.raises(UsageError, match="no such deployment"):
            await namespace.verify(reached, key)
        client.set(f"{base}:made", "garbage")
        assert await namespace.register(reached, key) is None
    await namespace.verify(reached, key)
