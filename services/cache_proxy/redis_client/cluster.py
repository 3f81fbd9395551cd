"""The backend for a Redis Cluster: each command goes to the node that has its slot, those of a node together.

redis-py knows the topology, and redirections are followed here. redis-py sends ASKING and the command that it
belongs to as two commands, possibly on two connections (`RedisCluster._execute_command`, 8.1).

The nodes that are queried for the topology are also chosen here: redis-py queries one after the other and
forgets the configured nodes (redis/redis-py#3604).
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any

from redis.asyncio.cluster import ClusterNode, PipelineCommand, RedisCluster
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    RedisClusterException,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.errors import StoreError
from services.cache_proxy.redis_client.backend import (
    CLIENT_ERRORS,
    RedisBackend,
    ScriptCall,
    SlotMovingError,
    to_store_error,
)
from services.cache_proxy.redis_client.lua_script import Script
from services.cache_proxy.redis_client.shared_attempt import SharedAttempt, first_success
from services.common.compat import override
from services.common.tasks import cancel_and_wait

_MAX_REDIRECTIONS = 5
_HASH_SLOTS = 16_384
_REFRESH_INTERVAL_SECONDS = 0.5
# redis-py raises a LookupError if no node has a slot, or any slot.
_CLUSTER_ERRORS = (*CLIENT_ERRORS, LookupError)
_DROPPED_CONNECTION_ERRORS = (RedisConnectionError, AttributeError)
_LOST_NODE_ERRORS = (*_DROPPED_CONNECTION_ERRORS, RedisTimeoutError, ClusterDownError, OSError)


class ClusterBackend(RedisBackend):
    """The servers of a Cluster.

    State: `_refreshed_at`, when the topology was last requested; `_refresh_task`, the task that requests it;
    `_topology_known`, whether redis-py has known a topology since the last `close`. Used from the event loop
    only.
    """

    one_tag_per_call = True

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        self._configured_nodes = dict(client.nodes_manager.startup_nodes)
        self._timeout_seconds = float(client.connection_kwargs["socket_timeout"])
        self._discovery = SharedAttempt(self._discover_topology, failure_ttl_seconds=self._timeout_seconds)
        self._topology_known = False
        self._refreshed_at = 0.0
        self._refresh_task: asyncio.Task[None] | None = None

    @override
    async def run_script(self, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        # The second key never exists: see `cache/lua/include/buckets.lua`.
        commands = [("EVALSHA", script.sha, 2, call.key, f"{call.key}-", *call.args) for call in calls]
        replies = await self._send(commands, [call.key for call in calls])
        # A node that does not have the script yet gets its text.
        unknown = [index for index, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            texts = [("EVAL", script.text, *commands[index][2:]) for index in unknown]
            text_replies = await self._send(texts, [calls[index].key for index in unknown])
            for index, reply in zip(unknown, text_replies, strict=True):
                replies[index] = reply
        return [_to_script_result(reply) for reply in replies]

    @override
    async def execute(self, key: str, *command: Any) -> Any:
        [reply] = await self._send([command], [key])
        if isinstance(reply, Exception):
            raise to_store_error(reply) from reply
        return reply

    @override
    async def read_many(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        replies = await self._send(commands, [command[1] for command in commands])
        for reply in replies:
            if isinstance(reply, Exception):
                raise to_store_error(reply) from reply
        return replies

    @override
    async def close(self) -> None:
        if self._refresh_task is not None:
            await cancel_and_wait([self._refresh_task])
        await self._discovery.close()
        self._topology_known = False
        # redis-py may have forgotten the configured nodes, and then does not close their connections.
        for node in self._configured_nodes.values():
            await node.disconnect()
        await self._client.aclose()

    async def node_for_key(self, key: str) -> ClusterNode:
        """Return the node that has the slot of a key. Raises the errors of redis-py."""
        await self._ensure_topology()
        return self._client.nodes_manager.get_node_from_slot(self._client.keyslot(key))

    async def _send(self, commands: Sequence[tuple[Any, ...]], keys: Sequence[str]) -> list[Any]:
        """Return the reply to each command, or the exception with which it failed; follow redirections."""
        replies: list[Any] = [None] * len(commands)
        try:
            await self._ensure_topology()
            slots = [self._client.keyslot(key) for key in keys]
        except _CLUSTER_ERRORS as error:
            return [error] * len(commands)
        # Index of each command to send -> the node to which an ASK redirection sent it, if any.
        pending: dict[int, ClusterNode | None] = dict.fromkeys(range(len(commands)))
        for attempt in range(_MAX_REDIRECTIONS):
            by_node: dict[str, tuple[ClusterNode, list[int]]] = {}
            for index, redirect_node in pending.items():
                try:
                    node = redirect_node or self._client.nodes_manager.get_node_from_slot(slots[index])
                except (RedisClusterException, LookupError) as error:
                    replies[index] = error
                    self._schedule_refresh()
                else:
                    by_node.setdefault(node.name, (node, []))[1].append(index)
            redirected = {index for index, redirect_node in pending.items() if redirect_node}
            await asyncio.gather(
                *(
                    _send_pipeline(node, indices, commands, redirected, replies)
                    for node, indices in by_node.values()
                )
            )
            pending = await self._commands_to_retry(pending, replies, first=attempt == 0)
            if not pending:
                break
        return replies

    async def _commands_to_retry(
        self, sent: Iterable[int], replies: list[Any], *, first: bool
    ) -> dict[int, ClusterNode | None]:
        """Return the indices of commands to send again, with the node if it is not that of the topology."""
        retries: dict[int, ClusterNode | None] = {}
        for index in sent:
            reply = replies[index]
            # A MovedError is an AskError, too.
            if isinstance(reply, AskError):
                if isinstance(reply, MovedError):
                    await self._client.nodes_manager.move_slot(reply)
                    retries[index] = None
                else:
                    retries[index] = self._client.get_node(host=reply.host, port=reply.port)
                    if retries[index] is None:
                        self._schedule_refresh()
            elif isinstance(reply, _LOST_NODE_ERRORS):
                self._schedule_refresh()
                # The server may only have closed a connection that was idle for too long.
                if first and isinstance(reply, _DROPPED_CONNECTION_ERRORS):
                    retries[index] = None
        return retries

    def _schedule_refresh(self) -> None:
        """Request the topology in the background, at most once in `_REFRESH_INTERVAL_SECONDS`."""
        if time.monotonic() - self._refreshed_at < _REFRESH_INTERVAL_SECONDS:
            return
        if self._refresh_task is None or self._refresh_task.done():
            self._refreshed_at = time.monotonic()
            self._refresh_task = asyncio.create_task(self._refresh_topology())

    async def _refresh_topology(self) -> None:
        try:
            await self._discovery.result()
        except _CLUSTER_ERRORS:
            # The next command fails as this one did and schedules another refresh.
            return

    async def _ensure_topology(self) -> None:
        """Make redis-py know a topology. Raises the errors of redis-py."""
        if not self._topology_known:
            await self._discovery.result()
        # Initialize again if another user of the client has closed it.
        await self._client.initialize()

    async def _discover_topology(self) -> None:
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
            except _CLUSTER_ERRORS:
                if not discovered_probes:
                    raise
                node = await first_success(discovered_probes)
        finally:
            await cancel_and_wait([*configured_probes, *discovered_probes])
        manager.startup_nodes = {node.name: node}
        try:
            await (manager.initialize() if self._topology_known else self._client.initialize())
        finally:
            # If no node of the Cluster has a slot yet, redis-py forgets even the nodes it was configured
            # with.
            if not manager.startup_nodes:
                manager.startup_nodes = dict(self._configured_nodes)
        self._topology_known = True

    async def _probe_node(self, node: ClusterNode) -> ClusterNode:
        """Return the node if it replies; later, if it does not know an owner for every slot."""
        ranges = await node.execute_command("CLUSTER SLOTS")
        if sum(last - first + 1 for first, last, *_ in ranges) < _HASH_SLOTS:
            await asyncio.sleep(self._timeout_seconds)
        return node


async def _send_pipeline(
    node: ClusterNode,
    indices: Sequence[int],
    commands: Sequence[tuple[Any, ...]],
    redirected: set[int],
    replies: list[Any],
) -> None:
    """Send commands to one node, those in `redirected` after an ASKING, and store their replies."""
    sent: list[PipelineCommand] = []
    for index in indices:
        if index in redirected:
            sent.append(PipelineCommand(-1, "ASKING"))
        sent.append(PipelineCommand(index, *commands[index]))
    try:
        await node.execute_pipeline(sent)
    except _CLUSTER_ERRORS as error:
        for index in indices:
            replies[index] = error
        return
    for command in sent:
        if command.position >= 0:
            replies[command.position] = command.result


def _to_script_result(reply: Any) -> Any:
    """Return the reply of a script, or the `StoreError` for its exception."""
    if isinstance(reply, TryAgainError) or (
        isinstance(reply, AskError) and not isinstance(reply, MovedError)
    ):
        return SlotMovingError("its slot is moving to another node")
    if isinstance(reply, Exception) and not isinstance(reply, StoreError):
        return to_store_error(reply)
    return reply
