"""Warns where Redis may evict any key: queue and limit live beside the cache, and must not go with it."""

import logging

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.node import Home

_log = logging.getLogger(__name__)

_SAFE = ("noeviction", "volatile-")  # nothing of the queue's has a time to live but what is remembered


class EvictionWatch:
    """State: the policy last seen."""

    def __init__(self, home: Home, *, metrics: ProxyMetrics) -> None:
        self._home = home
        self._metrics = metrics
        self._policy = ""

    async def look(self) -> None:
        """See what the server does when its memory is full. Raises redis-py's errors."""
        memory = await self._home.memory()
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
