"""Helpers for tests of answer stores."""

import asyncio
from collections.abc import Sequence

import redis
from prometheus_client import CollectorRegistry

from services.cache_proxy.cache.buckets import TagState, tag_for_digest
from services.cache_proxy.cache.entry import entry_day, entry_level, today
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.store import AnswerStore
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_keys import tag_state_key

OnRedis = tuple[RedisStore, ProxyMetrics, "redis.Redis", str]
"""A store, its metrics, another client of its server, and its base key: see the fixture `on_redis`."""


def spread_digest(number: int) -> bytes:
    """Return a digest; consecutive numbers are spread over all buckets, as hashes are."""
    return (number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128).to_bytes(16, "big")


async def stored_levels(store: AnswerStore, digests: Sequence[bytes]) -> list[int]:
    """Return the stored levels, 0 for a miss; all of them must have the current day."""
    entries = await store.get(digests)
    assert all(entry_day(entry) == today() for entry in entries if entry)
    return [entry_level(entry) for entry in entries]


def make_metrics() -> ProxyMetrics:
    """Return metrics with a separate registry."""
    return ProxyMetrics(CollectorRegistry())


async def wait_until_stored(store: AnswerStore, levels: dict[bytes, int]) -> None:
    """Poll until the store has these levels; pending answers are written in the background."""
    async with asyncio.timeout(10):
        while await stored_levels(store, list(levels)) != list(levels.values()):  # noqa: ASYNC110 - no event to await
            await asyncio.sleep(0.05)


def stored_tag_state(client: "redis.Redis", base: str, digest: bytes) -> TagState:
    """Return the state of the tag of a digest, as it is stored in Redis."""
    generation, buckets = client.hmget(tag_state_key(base, tag_for_digest(digest)), "generation", "buckets")
    assert isinstance(generation, bytes)
    assert isinstance(buckets, bytes)
    return TagState(generation.decode(), int(buckets))


def stored_bucket_key(client: "redis.Redis", base: str, digest: bytes) -> str:
    """Return the key of the bucket that holds a digest."""
    return stored_tag_state(client, base, digest).bucket_key(base, digest)
