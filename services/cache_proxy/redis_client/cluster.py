"""A Redis Cluster behind the store: a call goes to the node that has its slot, those of a node go together.

redis-py knows the topology; redirections are followed here. Its own way sends ASKING and the command that it
is meant for as two commands, which may go by two connections (`RedisCluster._execute_command`, 8.1).

The nodes to ask for the topology are chosen here, too: redis-py asks one after the other, and forgets the
nodes that it was given (redis/redis-py#3604).
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
    ScriptCall,
    SlotMovingError,
    to_store_error,
)
from services.cache_proxy.redis_client.lua_script import Script
from services.cache_proxy.redis_client.shared_attempt import SharedAttempt, first_success
from services.common.tasks import cancel_and_wait

_MAX_REDIRECTIONS = 5
_HASH_SLOTS = 16_384
_REFRESH_INTERVAL_SECONDS = 0.5
_CLUSTER_ERRORS = (*CLIENT_ERRORS, LookupError)  # how redis-py finds that nobody has a slot, or any slot
_DROPPED_CONNECTION_ERRORS = (RedisConnectionError, AttributeError)
_LOST_NODE_ERRORS = (*_DROPPED_CONNECTION_ERRORS, RedisTimeoutError, ClusterDownError, OSError)


class ClusterBackend:
    """Servers of a Cluster.

    State: `_refreshed_at`, when the topology was last requested; `_refreshing`, the task that requests it;
    `_located`, whether redis-py has known a topology since the last `close`.
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

    async def run_script(self, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        """See `Servers.run`."""
        # The second key never exists: see `lua/layout.lua`.
        commands = [("EVALSHA", script.sha, 2, call.key, f"{call.key}-", *call.args) for call in calls]
        replies = await self._send(commands, [call.key for call in calls])
        unknown = [place for place, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            texts = [("EVAL", script.text, *commands[place][2:]) for place in unknown]
            again = await self._send(texts, [calls[place].key for place in unknown])
            for place, reply in zip(unknown, again, strict=True):
                replies[place] = reply
        return [_to_script_result(reply) for reply in replies]

    async def execute(self, key: str, *command: Any) -> Any:
        """See `Servers.command`."""
        [reply] = await self._send([command], [key])
        if isinstance(reply, Exception):
            raise to_store_error(reply) from reply
        return reply

    async def read_many(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Servers.read`."""
        replies = await self._send(commands, [command[1] for command in commands])
        for reply in replies:
            if isinstance(reply, Exception):
                raise to_store_error(reply) from reply
        return replies

    async def close(self) -> None:
        """See `Servers.close`."""
        if self._refresh_task is not None:
            await cancel_and_wait([self._refresh_task])
        await self._discovery.close()
        self._topology_known = False
        for node in self._configured_nodes.values():  # redis-py may have forgotten them
            await node.disconnect()
        await self._client.aclose()

    async def node_for_key(self, key: str) -> ClusterNode:
        """Return the node that has the key's slot. Raises redis-py's errors."""
        await self._ensure_topology()
        return self._client.nodes_manager.get_node_from_slot(self._client.keyslot(key))

    async def _send(self, commands: Sequence[tuple[Any, ...]], keys: Sequence[str]) -> list[Any]:
        """The reply to each command, or the error that it ended with; redirections are followed."""
        replies: list[Any] = [None] * len(commands)
        try:
            await self._ensure_topology()
            slots = [self._client.keyslot(key) for key in keys]
        except _CLUSTER_ERRORS as error:
            return [error] * len(commands)
        todo: dict[int, ClusterNode | None] = dict.fromkeys(range(len(commands)))  # a node: it is to be asked
        for hop in range(_MAX_REDIRECTIONS):
            by_node: dict[str, tuple[ClusterNode, list[int]]] = {}
            for place, asked in todo.items():
                try:
                    node = asked or self._client.nodes_manager.get_node_from_slot(slots[place])
                except (RedisClusterException, LookupError) as error:
                    replies[place] = error
                    self._schedule_refresh()
                else:
                    by_node.setdefault(node.name, (node, []))[1].append(place)
            asking = {place for place, asked in todo.items() if asked}
            await asyncio.gather(
                *(
                    _send_pipeline(node, places, commands, asking, replies)
                    for node, places in by_node.values()
                )
            )
            todo = await self._commands_to_retry(todo, replies, first=hop == 0)
            if not todo:
                break
        return replies

    async def _commands_to_retry(
        self, sent: Iterable[int], replies: list[Any], *, first: bool
    ) -> dict[int, ClusterNode | None]:
        """Those to be asked again, and whom if the topology does not say."""
        again: dict[int, ClusterNode | None] = {}
        for place in sent:
            reply = replies[place]
            if isinstance(reply, AskError):  # a MovedError is one too
                if isinstance(reply, MovedError):
                    await self._client.nodes_manager.move_slot(reply)
                    again[place] = None
                else:
                    again[place] = self._client.get_node(host=reply.host, port=reply.port)
                    if again[place] is None:
                        self._schedule_refresh()
            elif isinstance(reply, _LOST_NODE_ERRORS):
                self._schedule_refresh()
                if first and isinstance(
                    reply, _DROPPED_CONNECTION_ERRORS
                ):  # it may just have lain idle for too long
                    again[place] = None
        return again

    def _schedule_refresh(self) -> None:
        """Ask the other nodes who has which slots, not too often, and with nobody waiting for it."""
        if time.monotonic() - self._refreshed_at < _REFRESH_INTERVAL_SECONDS:
            return
        if self._refresh_task is None or self._refresh_task.done():
            self._refreshed_at = time.monotonic()
            self._refresh_task = asyncio.create_task(self._refresh_topology())

    async def _refresh_topology(self) -> None:
        try:
            await self._discovery.result()
        except _CLUSTER_ERRORS:
            return  # whoever calls next will see that nothing has changed, and come here again

    async def _ensure_topology(self) -> None:
        """Have redis-py know a topology."""
        if not self._topology_known:
            await self._discovery.result()
        await self._client.initialize()  # again, where another user of the client has closed it

    async def _discover_topology(self) -> None:
        """Request the topology from a node that answers: named nodes first, then nodes that were found.

        The address of a node that was found may belong to another Cluster by now. The names of named nodes
        are resolved again with each connection.
        """
        manager = self._client.nodes_manager
        found = {
            name: node for name, node in manager.nodes_cache.items() if name not in self._configured_nodes
        }
        named, others = (
            {asyncio.create_task(self._probe_node(node)) for node in nodes.values()}
            for nodes in (self._configured_nodes, found)
        )
        try:
            try:
                node = await first_success(named)
            except _CLUSTER_ERRORS:
                if not others:
                    raise
                node = await first_success(others)
        finally:
            await cancel_and_wait([*named, *others])
        manager.startup_nodes = {node.name: node}
        try:
            await (manager.initialize() if self._topology_known else self._client.initialize())
        finally:
            # Of a Cluster that nobody has given a slot yet, redis-py forgets even the nodes that it was told.
            if not manager.startup_nodes:
                manager.startup_nodes = dict(self._configured_nodes)
        self._topology_known = True

    async def _probe_node(self, node: ClusterNode) -> ClusterNode:
        """Return a node that knows who has every slot; else, later than any of those, one that answers."""
        ranges = await node.execute_command("CLUSTER SLOTS")
        if sum(last - first + 1 for first, last, *_ in ranges) < _HASH_SLOTS:
            await asyncio.sleep(self._timeout_seconds)
        return node


async def _send_pipeline(
    node: ClusterNode,
    indices: Sequence[int],
    commands: Sequence[tuple[Any, ...]],
    asking: set[int],
    replies: list[Any],
) -> None:
    sent: list[PipelineCommand] = []
    for place in indices:
        if place in asking:
            sent.append(PipelineCommand(-1, "ASKING"))
        sent.append(PipelineCommand(place, *commands[place]))
    try:
        await node.execute_pipeline(sent)
    except _CLUSTER_ERRORS as error:
        for place in indices:
            replies[place] = error
        return
    for command in sent:
        if command.position >= 0:
            replies[command.position] = command.result


def _to_script_result(reply: Any) -> Any:
    """A script's reply, or what its error means to the store."""
    if isinstance(reply, TryAgainError) or (
        isinstance(reply, AskError) and not isinstance(reply, MovedError)
    ):
        return SlotMovingError("its slot is moving to another node")
    if isinstance(reply, Exception) and not isinstance(reply, StoreError):
        return to_store_error(reply)
    return reply
