"""One suite for every kind of answer store."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.cache_proxy.cache.store import AnswerStore
from services.cache_proxy.cache.store_factory import open_store
from services.cache_proxy.config.cache_settings import CacheSettings, KeySettings
from tests.support.answer_stores import make_metrics, spread_digest, stored_levels

_prefixes = (f"store{number}" for number in itertools.count())


@pytest.fixture(params=["memory", "redis", "embedded"])
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, shared_redis: str
) -> AsyncIterator[AnswerStore]:
    """Yield a store of each kind, opened as the proxy opens it."""
    url = {"memory": "memory:", "redis": shared_redis, "embedded": f"embedded:{tmp_path}"}[request.param]
    key_settings = KeySettings(key_prefix=next(_prefixes))
    cache = CacheSettings(cache_url=url, cache_timeout_seconds=10)
    async with open_store(cache, key_settings, make_metrics()) as opened:
        yield opened.store
        await opened.store.close()


async def test_get_returns_entries_in_the_order_of_digests(store: AnswerStore) -> None:
    """The digests exceed one script call, and include unknown and repeated ones."""
    levels = {spread_digest(number): number % 7 + 1 for number in range(2500)}
    await store.put(levels)
    digests = [*reversed(levels), spread_digest(10**6), *list(levels)[:5]]
    assert await stored_levels(store, digests) == [levels.get(digest, 0) for digest in digests]
    assert list(await store.get([])) == []
    await store.put({})


async def test_last_write_replaces_earlier_ones(store: AnswerStore) -> None:
    """Repeating a write changes nothing; a newer level replaces an older one."""
    for level in (3, 3, 7, 1):
        await store.put({spread_digest(1): level})
        assert await stored_levels(store, [spread_digest(1)]) == [level]


async def test_concurrent_operations_do_not_mix(store: AnswerStore) -> None:
    """Forty concurrent tasks each find the answers that they wrote."""

    async def write_and_read(number: int) -> None:
        levels = {spread_digest(number * 1000 + index): (number + index) % 7 + 1 for index in range(300)}
        await store.put(levels)
        assert await stored_levels(store, list(levels)) == list(levels.values())

    await asyncio.gather(*(write_and_read(number) for number in range(40)))
