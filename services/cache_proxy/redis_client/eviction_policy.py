"""Warn if Redis may evict any key: queue and limit are stored beside the cache and must not be evicted."""

import logging

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.node import QueueNode

_log = logging.getLogger(__name__)

# Of the queue's keys, only remembered outcomes have a time to live. So `volatile-` policies spare the others.
_SAFE_POLICY_PREFIXES = ("noeviction", "volatile-")


class EvictionPolicyCheck:
    """Check the `maxmemory-policy` of the server that holds the queue.

    State: `_policy`, the policy at the last check. Used from the event loop only.
    """

    def __init__(self, node: QueueNode, *, metrics: ProxyMetrics) -> None:
        self._node = node
        self._metrics = metrics
        self._policy = ""

    async def check(self) -> None:
        """Read the policy, set the gauge and log an unsafe policy once. Raises the errors of redis-py."""
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
