"""The server that holds the queue: a single server, the master that Sentinels name, or a node of a Cluster.

On a Cluster, the queue's scripts run on the node that has the slot of the queue's hash tag. So replicas
subscribe there, because a script counts the subscribers of its node only (see `reap` in the queue's Lua
files), and it is the memory of that node that is checked.
"""

from typing import Any

from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.exceptions import RedisClusterException

from services.cache_proxy.redis_client.client_factory import RedisClient, backend_for
from services.cache_proxy.redis_client.cluster import ClusterBackend


class QueueNode:
    """The server that has a key of the queue; all keys of the queue have one hash tag.

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
        """The number of the server's database that holds the queue; always 0 on a Cluster."""
        if isinstance(self._client, RedisCluster):
            return 0
        return int(self._client.connection_pool.connection_kwargs.get("db") or 0)

    async def command(self, *command: Any) -> Any:
        """Return the reply to a command. Raises `StoreError` with the client's exception as its cause.

        Redirections of a Cluster are followed without redis-py's help (see `redis_client/cluster.py`):
        redis-py decides by itself how often it runs a command again.
        """
        return await self._backend.execute(self._key, *command)

    async def command_for_key(self, key: str, *command: Any) -> Any:
        """Return the reply of the server that has `key`, which may be another node of a Cluster.

        Raises `StoreError`.
        """
        return await self._backend.execute(key, *command)

    async def create_pubsub(self) -> PubSub:
        """Return a subscriber on the server that has the queue now; it does not follow the queue elsewhere.

        On a Cluster, redis-py would choose the node by the first channel and keep it through every failover.
        """
        if isinstance(self._client, RedisCluster):
            return self._client.pubsub(node=await self._cluster_node(), ignore_subscribe_messages=True)
        return self._client.pubsub(ignore_subscribe_messages=True)

    async def memory_info(self) -> dict[str, Any]:
        """Return the reply to `INFO memory` of the server. Raises the errors of redis-py."""
        if isinstance(self._client, RedisCluster):
            node = await self._cluster_node()
            info: dict[str, Any] = await node.execute_command("INFO", "memory")
            return info
        return dict(await self._client.info("memory"))

    async def drop_connections(self) -> None:
        """Drop all connections, because the server has become a replica.

        New connections reach the master behind its address or by its Sentinels. Connections in use are
        dropped when they are released. A Cluster needs none of this: its replicas redirect to the master.
        """
        if not isinstance(self._client, RedisCluster):
            pool = self._client.connection_pool
            await pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
            await pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Stop the background tasks for a Cluster; the shared client connects again when it is used."""
        if self.is_cluster:
            await self._backend.close()

    async def _cluster_node(self) -> ClusterNode:
        # For the type checker: only a Cluster has such a node.
        assert isinstance(self._backend, ClusterBackend)  # noqa: S101
        try:
            return await self._backend.node_for_key(self._key)
        except LookupError as error:
            message = "no node of the Cluster has the queue's slot"
            raise RedisClusterException(message) from error
