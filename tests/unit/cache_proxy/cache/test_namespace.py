"""The registered key schema of a deployment, the sweeper, and two model versions in one Redis."""

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


async def test_verify_names_the_setting_that_differs_from_the_deployment(
    backend: RedisBackend, base: str, tmp_path: Path
) -> None:
    """A different prefix, version, normal form or secret is named; equal settings pass."""
    secret = tmp_path / "secret"
    other = tmp_path / "other"
    secret.write_bytes(b"s3cret")
    other.write_bytes(b"another")
    key_settings = KeySettings(key_prefix=base, key_secret_file=str(secret), model_version="7")
    with pytest.raises(UsageError, match="--key-prefix"):
        await namespace.verify(backend, key_settings)
    await namespace.verify(backend, key_settings, allow_new=True)
    assert await namespace.register(backend, key_settings) is None
    await namespace.verify(backend, key_settings)
    for changed, flag in (
        ({"model_version": "8"}, "--model-version 8: the deployment knows only 7"),
        ({"normalize": "exact"}, "--normalize exact"),
        ({"key_secret_file": None}, "--key-secret-file"),
        ({"key_secret_file": str(other)}, "--key-secret-file"),
    ):
        with pytest.raises(UsageError, match=flag):
            await namespace.verify(backend, replace(key_settings, **changed))


async def test_schema_holds_no_secret_and_last_start_replaces_it(
    backend: RedisBackend, base: str, shared_redis: str, tmp_path: Path
) -> None:
    """A hash of the secret is stored; a start with other settings gets the previous schema."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"hunter2")
    key_settings = KeySettings(key_prefix=base, key_secret_file=str(secret))
    await namespace.register(backend, key_settings)
    previous = await namespace.register(backend, replace(key_settings, normalize="exact"))
    assert previous is not None
    assert previous.normalize == "fold"
    with pytest.raises(UsageError, match="made with exact"):
        await namespace.verify(backend, key_settings)
    with redis.Redis.from_url(shared_redis) as client:
        assert b"hunter2" not in b"".join(client.hvals(f"{base}:made"))


@pytest.mark.parametrize(
    "garbage", [b"", b"\xff garbage", b"fold 1", b"fold %s none" % (b"9" * 5000), b"fold x y"]
)
async def test_damaged_schema_is_replaced_by_the_settings(
    garbage: bytes, backend: RedisBackend, base: str, shared_redis: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A command and a replica treat it as absent, log it once and store their schema."""
    key_settings = KeySettings(key_prefix=base)
    with redis.Redis.from_url(shared_redis) as client:
        for repair in (namespace.verify, namespace.register):
            client.hset(f"{base}:made", "1", garbage)
            await repair(backend, key_settings)
            assert client.hget(f"{base}:made", "1") == b"fold 1 none"
            await namespace.verify(backend, key_settings)
    assert len(caplog.records) == 2


async def test_sweeper_registers_schema_and_warns_of_a_different_one(
    redis_store: RedisStore, backend: RedisBackend, base: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A proxy that starts stores how it makes keys, and logs a warning if that has changed."""
    key_settings = KeySettings(key_prefix=base)
    for settings, warnings in (
        (key_settings, 0),
        (key_settings, 0),
        (replace(key_settings, normalize="exact"), 1),
    ):
        caplog.clear()
        sweeper = Sweeper(backend, redis_store, key_settings=settings, freshness=FreshnessPolicy())
        task = asyncio.create_task(sweeper.run())
        async with asyncio.timeout(5):
            while not await _is_verified(backend, settings):  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.01)
        await cancel_and_wait([task])
        assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == warnings


async def test_sweeper_works_after_secret_file_is_removed(
    redis_store: RedisStore, backend: RedisBackend, base: str, tmp_path: Path
) -> None:
    """The file is removed before Redis is first backend: the secret was read at the start."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    secret.chmod(0o600)
    key_settings = KeySettings(key_prefix=base, key_secret_file=str(secret))
    sweeper = Sweeper(backend, redis_store, key_settings=key_settings, freshness=FreshnessPolicy())
    secret.unlink()
    task = asyncio.create_task(sweeper.run())
    async with asyncio.timeout(5):
        while await backend.execute(f"{base}:made", "HLEN", f"{base}:made") == 0:
            assert not task.done(), task.exception()
            await asyncio.sleep(0.01)
    await cancel_and_wait([task])


async def test_sweeper_with_unexpected_error_is_logged_and_restarted(
    shared_redis: str, base: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The background task never ends silently."""
    started = asyncio.Event()

    async def fail(_self: Sweeper) -> None:
        started.set()
        raise RuntimeError("unexpected")

    monkeypatch.setattr(Sweeper, "run", fail)
    cache = CacheSettings(cache_url=shared_redis)
    async with open_store(cache, KeySettings(key_prefix=base), ProxyMetrics(CollectorRegistry())):
        async with asyncio.timeout(5):
            await started.wait()
            while "begins anew" not in caplog.text:  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.01)


async def _is_verified(backend: RedisBackend, key_settings: KeySettings) -> bool:
    try:
        await namespace.verify(backend, key_settings)
    except UsageError:
        return False
    return True


async def test_sweeper_registers_schema_again_after_flush(
    redis_store: RedisStore, backend: RedisBackend, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands find a running deployment, whatever Redis has lost."""
    monkeypatch.setattr("services.cache_proxy.cache.sweeper._IDLE_INTERVAL_SECONDS", 0.01)
    key_settings = KeySettings(key_prefix=base)
    task = asyncio.create_task(
        Sweeper(backend, redis_store, key_settings=key_settings, freshness=FreshnessPolicy()).run()
    )
    async with asyncio.timeout(5):
        for _ in range(2):
            while not await _is_verified(backend, key_settings):  # noqa: ASYNC110 - no event to await
                await asyncio.sleep(0.01)
            await backend.execute(f"{base}:made", "UNLINK", f"{base}:made")
    await cancel_and_wait([task])


async def test_sweeper_with_wrong_clock_deletes_nothing(
    redis_store: RedisStore, backend: RedisBackend, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is forty days ahead and answers are kept for thirty: the clock of Redis decides."""
    digest = bytes(16)
    await redis_store.put({digest: 5})
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 40 * 86_400)
    freshness = FreshnessPolicy(ttl_days=30)
    await Sweeper(backend, redis_store, key_settings=KeySettings(key_prefix=base), freshness=freshness).step(
        0
    )
    assert (await redis_store.get([digest]))[0]


@pytest.mark.parametrize(("serve_stale", "kept"), [(False, [29]), (True, [29, 30, 59])])
async def test_sweeper_deletes_answers_that_are_no_longer_served(
    redis_store: RedisStore, backend: RedisBackend, base: str, serve_stale: bool, kept: list[int]
) -> None:
    """An answer is deleted after its time to live, or after twice that where stale ones are served."""
    ages = [29, 30, 59, 60, 300]
    digests = {age: bytes((age % 256,)) + bytes(15) for age in ages}
    for age, digest in digests.items():
        await redis_store.put({digest: 5}, day=today() - age)
    freshness = FreshnessPolicy(ttl_days=30, serve_stale=serve_stale)
    sweeper = Sweeper(backend, redis_store, key_settings=KeySettings(key_prefix=base), freshness=freshness)
    for tag in range(TAGS):
        await sweeper.step(tag)
    entries = await redis_store.get(list(digests.values()))
    assert [age for age, entry in zip(ages, entries, strict=True) if entry] == kept


async def test_answers_of_previous_version_are_served_until_inferred_again(
    shared_redis: str, base: str
) -> None:
    """Such answers are marked as not fresh; a new answer replaces them.

    A rollback to the previous version finds its answers unchanged.
    """
    cache = CacheSettings(cache_url=shared_redis)
    old_version = KeySettings(key_prefix=base)
    new_version = replace(old_version, model_version="2")
    metrics = ProxyMetrics(CollectorRegistry())
    digests = [bytes((number,)) * 16 for number in range(3)]
    async with open_store(cache, old_version, metrics) as opened:
        await opened.store.put({digests[0]: 3, digests[1]: 4})
        await opened.store.close()
    async with open_store(cache, new_version, metrics, AnswerSettings(previous_model_version="1")) as opened:
        assert len(opened.invalidation_logs) == 2
        resilient = ResilientStore(opened.store, metrics=metrics)
        await resilient.put({digests[0]: 6})
        entries = await resilient.get_entries(digests)
        assert [entry_level(entry) for entry in entries] == [6, 4, 0]
        assert [bool(entry & FROM_PREVIOUS_VERSION) for entry in entries] == [False, True, False]
        assert await resilient.get_levels(digests) == [6, 0, 0]
        await opened.store.delete([digests[1]])
        assert not (await resilient.get_entries(digests))[1]
        await resilient.close()
    async with open_store(cache, old_version, metrics) as opened:
        assert list(await opened.store.get(digests)) == [pack_entry(3, today()), 0, 0]
        await opened.store.close()


async def test_schema_key_of_wrong_type_is_replaced(
    backend: RedisBackend, base: str, shared_redis: str
) -> None:
    """For a command there is no deployment; the next start registers its schema."""
    key_settings = KeySettings(key_prefix=base)
    with redis.Redis.from_url(shared_redis) as client:
        client.set(f"{base}:made", "garbage")
        with pytest.raises(UsageError, match="no such deployment"):
            await namespace.verify(backend, key_settings)
        client.set(f"{base}:made", "garbage")
        assert await namespace.register(backend, key_settings) is None
    await namespace.verify(backend, key_settings)
