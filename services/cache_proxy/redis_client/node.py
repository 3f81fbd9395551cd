"""Where the queue lives: a server by itself, the master that Sentinels name, or a Cluster's node.

On a Cluster the scripts run where the slot of the queue's hash tag is. So that is where replicas subscribe (a
script counts the subscribers of its own node, see `reap` in the prelude), and whose memory is looked at.
"""

from typing import Any

from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException

from services.cache_proxy.redis_client.client_factory import RedisClient, backend_for
from services.cache_proxy.redis_client.cluster import ClusterBackend


class QueueNode:
    """One key of the queue says where it is: all of them have one hash tag. No state of its own.

    `user` is the ACL user of the connections, for messages.
    """

    def __init__(self, client: RedisClient, *, key: str, user: str = "default") -> None:
        self.user = user
        self._client = client
        self._key = key
        self._backend = backend_for(client)

    @property
    def is_cluster(self) -> bool:
        """Whether other keys may be on other nodes."""
        return isinstance(self._client, RedisCluster)

    @property
    def database(self) -> int:
        """The number of the server's database that the queue is in. A Cluster has only 0."""
        if isinstance(self._client, RedisCluster):
            return 0
        return int(self._client.connection_pool.connection_kwargs.get("db") or 0)

    async def command(self, *command: Any) -> Any:
        """Its reply. Raises `StoreError`, its cause what the client or the server said.

        A Cluster's redirections are followed without redis-py's help (see `store/cluster.py`), which runs a
        command again as often as it sees fit.
        """
        return await self._backend.execute(self._key, *command)

    async def command_for_key(self, key: str, *command: Any) -> Any:
        """Return the reply of the server that has `key`, perhaps another one of a Cluster.

        Raises `StoreError`.
        """
        return await self._backend.execute(key, *command)

    async def create_pubsub(self) -> PubSub:
        """To subscribe with where the queue is just now; it does not move with it.

        redis-py's own choice of a node is made once, by the first channel, and kept through every failover.
        """
        if isinstance(self._client, RedisCluster):
            return self._client.pubsub(node=await self._cluster_node(), ignore_subscribe_messages=True)
        return self._client.pubsub(ignore_subscribe_messages=True)

    async def memory_info(self) -> dict[str, Any]:
        """`INFO memory` of the server where the queue is. Raises redis-py's errors."""
        if isinstance(self._client, RedisCluster):
            node = await self._cluster_node()
            found: dict[str, Any] = await node.execute_command("INFO", "memory")
            return found
        return dict(await self._client.info("memory"))

    async def drop_connections(self) -> None:
        """The server is a replica now: whoever is behind its address, or its Sentinels, knows the master.

        Those in use are dropped when they come back. A Cluster's replica says itself where to go.
        """
        if not isinstance(self._client, RedisCluster):
            pool = self._client.connection_pool
            await pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
            await pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """End what this began on a Cluster; the client, which others share, opens again when it is used."""
        if self.is_cluster:
            await self._backend.close()

    async def _cluster_node(self) -> ClusterNode:
        assert isinstance(self._backend, ClusterBackend)  # noqa: S101 - for the type checker
        try:
            return await self._backend.node_for_key(self._key)
        except LookupError as error:
            message = "no node of the Cluster has the queue's slot"
            raise RedisClusterException(message) from error
