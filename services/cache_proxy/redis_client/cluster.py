"""The backend for a Redis Cluster: each command goes to the node that has its slot, those of a node together.

redis-py knows the topology, and redirections are followed here. redis-py sends ASKING and the command that it
belongs to as two commands, possibly on two connections (`RedisCluster._execute_command`, 8.1).
"""

import asyncio
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
    RedisBackend,
    ScriptCall,
    SlotMovingError,
    to_store_error,
)
from services.cache_proxy.redis_client.cluster_topology import CLUSTER_ERRORS, ClusterTopology
from services.cache_proxy.redis_client.lua_script import Script
from services.common.compat import override

_MAX_REDIRECTIONS = 5
_DROPPED_CONNECTION_ERRORS = (RedisConnectionError, AttributeError)
_LOST_NODE_ERRORS = (*_DROPPED_CONNECTION_ERRORS, RedisTimeoutError, ClusterDownError, OSError)


class ClusterBackend(RedisBackend):
    """The servers of a Cluster; `ClusterTopology` finds the node for a slot."""

    one_tag_per_call = True

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        self._topology = ClusterTopology(client)

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
        await self._topology.close()
        await self._client.aclose()

    async def node_for_key(self, key: str) -> ClusterNode:
        """Return the node that has the slot of a key. Raises the errors of redis-py."""
        await self._topology.ensure_known()
        return self._client.nodes_manager.get_node_from_slot(self._client.keyslot(key))

    async def _send(self, commands: Sequence[tuple[Any, ...]], keys: Sequence[str]) -> list[Any]:
        """Return the reply to each command, or the exception with which it failed; follow redirections."""
        replies: list[Any] = [None] * len(commands)
        try:
            await self._topology.ensure_known()
            slots = [self._client.keyslot(key) for key in keys]
        except CLUSTER_ERRORS as error:
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
                    self._topology.schedule_refresh()
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
                        self._topology.schedule_refresh()
            elif isinstance(reply, _LOST_NODE_ERRORS):
                self._topology.schedule_refresh()
                # The server may only have closed a connection that was idle for too long.
                if first and isinstance(reply, _DROPPED_CONNECTION_ERRORS):
                    retries[index] = None
        return retries


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
    except CLUSTER_ERRORS as error:
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
