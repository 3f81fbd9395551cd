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

from services.cache_proxy.cache.cache_scripts import Script
from services.cache_proxy.errors import StoreError
from services.cache_proxy.redis_client.backend import FAILURES, Call, SlotMoving, translated
from services.cache_proxy.redis_client.shared_attempt import SharedAttempt, first_success
from services.common.tasks import end

_HOPS = 5
_SLOTS = 16_384
_REFRESH_SECONDS = 0.5
_FAILURES = (*FAILURES, LookupError)  # how redis-py finds that nobody has a slot, or any slot
_DROPPED = (RedisConnectionError, AttributeError)
_LOST = (*_DROPPED, RedisTimeoutError, ClusterDownError, OSError)


class ClusterServers:
    """Servers of a Cluster.

    State: `_refreshed_at`, when the topology was last requested; `_refreshing`, the task that requests it;
    `_located`, whether redis-py has known a topology since the last `close`.
    """

    by_tag = True

    def __init__(self, client: RedisCluster) -> None:
        self._client = client
        self._named = dict(client.nodes_manager.startup_nodes)
        self._timeout_seconds = float(client.connection_kwargs["socket_timeout"])
        self._location = SharedAttempt(self._locate, hold_seconds=self._timeout_seconds)
        self._located = False
        self._refreshed_at = 0.0
        self._refreshing: asyncio.Task[None] | None = None

    async def run(self, script: Script, calls: Sequence[Call]) -> list[Any]:
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
        return [_outcome(reply) for reply in replies]

    async def command(self, key: str, *command: Any) -> Any:
        """See `Servers.command`."""
        [reply] = await self._send([command], [key])
        if isinstance(reply, Exception):
            raise translated(reply) from reply
        return reply

    async def read(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Servers.read`."""
        replies = await self._send(commands, [command[1] for command in commands])
        for reply in replies:
            if isinstance(reply, Exception):
                raise translated(reply) from reply
        return replies

    async def close(self) -> None:
        """See `Servers.close`."""
        if self._refreshing is not None:
            await end([self._refreshing])
        await self._location.close()
        self._located = False
        for node in self._named.values():  # redis-py may have forgotten them
            await node.disconnect()
        await self._client.aclose()

    async def node_of(self, key: str) -> ClusterNode:
        """Return the node that has the key's slot. Raises redis-py's errors."""
        await self._initialize()
        return self._client.nodes_manager.get_node_from_slot(self._client.keyslot(key))

    async def _send(self, commands: Sequence[tuple[Any, ...]], keys: Sequence[str]) -> list[Any]:
        """The reply to each command, or the error that it ended with; redirections are followed."""
        replies: list[Any] = [None] * len(commands)
        try:
            await self._initialize()
            slots = [self._client.keyslot(key) for key in keys]
        except _FAILURES as error:
            return [error] * len(commands)
        todo: dict[int, ClusterNode | None] = dict.fromkeys(range(len(commands)))  # a node: it is to be asked
        for hop in range(_HOPS):
            by_node: dict[str, tuple[ClusterNode, list[int]]] = {}
            for place, asked in todo.items():
                try:
                    node = asked or self._client.nodes_manager.get_node_from_slot(slots[place])
                except (RedisClusterException, LookupError) as error:
                    replies[place] = error
                    self._refresh()
                else:
                    by_node.setdefault(node.name, (node, []))[1].append(place)
            asking = {place for place, asked in todo.items() if asked}
            await asyncio.gather(
                *(_send_to(node, places, commands, asking, replies) for node, places in by_node.values())
            )
            todo = await self._redirected(todo, replies, first=hop == 0)
            if not todo:
                break
        return replies

    async def _redirected(
        self, asked: Iterable[int], replies: list[Any], *, first: bool
    ) -> dict[int, ClusterNode | None]:
        """Those to be asked again, and whom if the topology does not say."""
        again: dict[int, ClusterNode | None] = {}
        for place in asked:
            reply = replies[place]
            if isinstance(reply, AskError):  # a MovedError is one too
                if isinstance(reply, MovedError):
                    await self._client.nodes_manager.move_slot(reply)
                    again[place] = None
                else:
                    again[place] = self._client.get_node(host=reply.host, port=reply.port)
                    if again[place] is None:
                        self._refresh()
            elif isinstance(reply, _LOST):
                self._refresh()
                if first and isinstance(reply, _DROPPED):  # it may just have lain idle for too long
                    again[place] = None
        return again

    def _refresh(self) -> None:
        """Ask the other nodes who has which slots, not too often, and with nobody waiting for it."""
        if time.monotonic() - self._refreshed_at < _REFRESH_SECONDS:
            return
        if self._refreshing is None or self._refreshing.done():
            self._refreshed_at = time.monotonic()
            self._refreshing = asyncio.create_task(self._ask_for_topology())

    async def _ask_for_topology(self) -> None:
        try:
            await self._location.outcome()
        except _FAILURES:
            return  # whoever calls next will see that nothing has changed, and come here again

    async def _initialize(self) -> None:
        """Have redis-py know a topology."""
        if not self._located:
            await self._location.outcome()
        await self._client.initialize()  # again, where another user of the client has closed it

    async def _locate(self) -> None:
        """Request the topology from a node that answers: named nodes first, then nodes that were found.

        The address of a node that was found may belong to another Cluster by now. The names of named nodes
        are resolved again with each connection.
        """
        manager = self._client.nodes_manager
        found = {name: node for name, node in manager.nodes_cache.items() if name not in self._named}
        named, others = (
            {asyncio.create_task(self._answering(node)) for node in nodes.values()}
            for nodes in (self._named, found)
        )
        try:
            try:
                node = await first_success(named)
            except _FAILURES:
                if not others:
                    raise
                node = await first_success(others)
        finally:
            await end([*named, *others])
        manager.startup_nodes = {node.name: node}
        try:
            await (manager.initialize() if self._located else self._client.initialize())
        finally:
            # Of a Cluster that nobody has given a slot yet, redis-py forgets even the nodes that it was told.
            if not manager.startup_nodes:
                manager.startup_nodes = dict(self._named)
        self._located = True

    async def _answering(self, node: ClusterNode) -> ClusterNode:
        """Return a node that knows who has every slot; else, later than any of those, one that answers."""
        ranges = await node.execute_command("CLUSTER SLOTS")
        if sum(last - first + 1 for first, last, *_ in ranges) < _SLOTS:
            await asyncio.sleep(self._timeout_seconds)
        return node


async def _send_to(
    node: ClusterNode,
    places: Sequence[int],
    commands: Sequence[tuple[Any, ...]],
    asking: set[int],
    replies: list[Any],
) -> None:
    sent: list[PipelineCommand] = []
    for place in places:
        if place in asking:
            sent.append(PipelineCommand(-1, "ASKING"))
        sent.append(PipelineCommand(place, *commands[place]))
    try:
        await node.execute_pipeline(sent)
    except _FAILURES as error:
        for place in places:
            replies[place] = error
        return
    for command in sent:
        if command.position >= 0:
            replies[command.position] = command.result


def _outcome(reply: Any) -> Any:
    """A script's reply, or what its error means to the store."""
    if isinstance(reply, TryAgainError) or (
        isinstance(reply, AskError) and not isinstance(reply, MovedError)
    ):
        return SlotMoving("its slot is moving to another node")
    if isinstance(reply, Exception) and not isinstance(reply, StoreError):
        return translated(reply)
    return reply
