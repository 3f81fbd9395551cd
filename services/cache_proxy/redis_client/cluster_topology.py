"""Make redis-py know the topology of a Cluster, and refresh it after failures.

The nodes that are queried for the topology are chosen here: redis-py queries one after the other and forgets
the configured nodes (redis/redis-py#3604).
"""

import asyncio
import time

from redis.asyncio.cluster import ClusterNode, RedisCluster

from services.cache_proxy.redis_client.backend import CLIENT_ERRORS
from services.cache_proxy.redis_client.shared_attempt import SharedAttempt, first_success
from services.common.tasks import cancel_and_wait

_HASH_SLOTS = 16_384
_REFRESH_INTERVAL_SECONDS = 0.5
CLUSTER_ERRORS = (*CLIENT_ERRORS, LookupError)
"""What redis-py raises on a Cluster: a LookupError if no node has a slot, or any slot."""


class ClusterTopology:
    """Which node has which slot, as redis-py knows it.

    State: `_refreshed_at`, when the topology was last requested; `_refresh_task`, the task that requests it;
    `_is_known`, whether redis-py has known a topology since the last `close`. Used from the event loop only.
    """

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        self._configured_nodes = dict(client.nodes_manager.startup_nodes)
        self._timeout_seconds = float(client.connection_kwargs["socket_timeout"])
        self._discovery = SharedAttempt(self._discover, failure_ttl_seconds=self._timeout_seconds)
        self._is_known = False
        self._refreshed_at = 0.0
        self._refresh_task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop the discovery and close the connections to the configured nodes."""
        if self._refresh_task is not None:
            await cancel_and_wait([self._refresh_task])
        await self._discovery.close()
        self._is_known = False
        # redis-py may have forgotten the configured nodes, and then does not close their connections.
        for node in self._configured_nodes.values():
            await node.disconnect()

    def schedule_refresh(self) -> None:
        """Request the topology in the background, at most once in `_REFRESH_INTERVAL_SECONDS`."""
        if time.monotonic() - self._refreshed_at < _REFRESH_INTERVAL_SECONDS:
            return
        if self._refresh_task is None or self._refresh_task.done():
            self._refreshed_at = time.monotonic()
            self._refresh_task = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        try:
            await self._discovery.result()
        except CLUSTER_ERRORS:
            # The next command fails as this one did and schedules another refresh.
            return

    async def ensure_known(self) -> None:
        """Make redis-py know a topology. Raises the errors of redis-py."""
        if not self._is_known:
            await self._discovery.result()
        # Initialize again if another user of the client has closed it.
        await self._client.initialize()

    async def _discover(self) -> None:
        """Request the topology from a node that replies: configured nodes first, then discovered ones.

        The address of a discovered node may belong to another Cluster by now. The names of configured nodes
        are resolved again for each connection.
        """
        manager = self._client.nodes_manager
        discovered = {
            name: node for name, node in manager.nodes_cache.items() if name not in self._configured_nodes
        }
        configured_probes, discovered_probes = (
            {asyncio.create_task(self._probe_node(node)) for node in nodes.values()}
            for nodes in (self._configured_nodes, discovered)
        )
        try:
            try:
                node = await first_success(configured_probes)
            except CLUSTER_ERRORS:
                if not discovered_probes:
                    raise
                node = await first_success(discovered_probes)
        finally:
            await cancel_and_wait([*configured_probes, *discovered_probes])
        manager.startup_nodes = {node.name: node}
        try:
            await (manager.initialize() if self._is_known else self._client.initialize())
        finally:
            # If no node of the Cluster has a slot yet, redis-py forgets even the nodes it was configured
            # with.
            if not manager.startup_nodes:
                manager.startup_nodes = dict(self._configured_nodes)
        self._is_known = True

    async def _probe_node(self, node: ClusterNode) -> ClusterNode:
        """Return the node if it replies; later, if it does not know an owner for every slot."""
        ranges = await node.execute_command("CLUSTER SLOTS")
        if sum(last - first + 1 for first, last, *_ in ranges) < _HASH_SLOTS:
            await asyncio.sleep(self._timeout_seconds)
        return node
