"""Warns where Redis may evict any key: queue and limit live beside the cache, and must not go with it."""

import logging

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.node import QueueNode

_log = logging.getLogger(__name__)

_SAFE_POLICY_PREFIXES = (
    "noeviction",
    "volatile-",
)  # nothing of the queue's has a time to live but what is remembered


class EvictionPolicyCheck:
    """State: the policy last seen."""

    def __init__(self, node: QueueNode, *, metrics: ProxyMetrics) -> None:
        self._node = node
        self._metrics = metrics
        self._policy = ""

    async def check(self) -> None:
        """See what the server does when its memory is full. Raises redis-py's errors."""
        memory = await self._node.memory_info()
        policy = str(memory.get("maxmemory_policy", ""))
        if policy == self._policy:
            return
        self._policy = policy
        evicts = bool(policy) and not policy.startswith(_SAFE_POLICY_PREFIXES)
        self._metrics.store_may_evict.set(evicts)
        if evicts:
            _log.error(
                "Redis evicts any key when its memory is full (maxmemory-policy %s): the queue and the limit "
                "of all replicas may be lost; set noeviction or volatile-lru",
                policy,
            )
