"""Warns where Redis may evict any key: queue and limit live beside the cache, and must not go with it."""

import logging

import redis.asyncio

from services.cache_proxy.metrics import ProxyMetrics

_log = logging.getLogger(__name__)

_SAFE = ("noeviction", "volatile-")  # nothing of the queue's has a time to live but what is remembered


class EvictionWatch:
    """State: the policy last seen."""

    def __init__(self, client: "redis.asyncio.Redis", *, metrics: ProxyMetrics) -> None:
        self._client = client
        self._metrics = metrics
        self._policy = ""

    async def look(self) -> None:
        """See what the server does when its memory is full. Raises `RedisError`."""
        memory = await self._client.info("memory")
        policy = str(memory.get("maxmemory_policy", ""))
        if policy == self._policy:
            return
        self._policy = policy
        evicts = bool(policy) and not policy.startswith(_SAFE)
        self._metrics.store_evicts.set(evicts)
        if evicts:
            _log.error(
                "Redis evicts any key when its memory is full (maxmemory-policy %s): the queue and the limit "
                "of all replicas may be lost; set noeviction or volatile-lru",
                policy,
            )
