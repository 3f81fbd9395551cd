"""A real Redis Cluster for tests, and the operations of an operator on it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import redis
from redis.cluster import RedisCluster

from tests.support.redis_server import RedisServer, free_port, redis_process, wait_for

# Each master has one replica.
_MASTERS = 3
_NODES = 6
_SLOTS = 16_384
_SETTINGS = (
    "--cluster-enabled",
    "yes",
    "--cluster-node-timeout",
    "2000",
    "--repl-diskless-sync-delay",
    "0",
    "--repl-ping-replica-period",
    "1",
    "--appendonly",
    "no",
    "--cluster-require-full-coverage",
    "no",
)


class Cluster:
    """A Cluster of three masters with a replica each.

    `masters` are the nodes that were masters at the start; `tls_ports` are the TLS ports of the nodes.
    """

    def __init__(self, nodes: Sequence[RedisServer], tls_ports: Sequence[int] = ()) -> None:
        self.nodes = nodes
        self.masters = nodes[:_MASTERS]
        self.tls_ports = tls_ports

    @property
    def url(self) -> str:
        """The value for `--cache-url`."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])

    def client(self) -> RedisCluster:
        """Return a new client."""
        return RedisCluster(host="127.0.0.1", port=self.nodes[1].port)

    def owner(self, slot: int, *, excluding: RedisServer | None = None) -> RedisServer:
        """Return the master that has a slot, as the first node that replies knows it, except `excluding`."""
        for first, last, (_, port, *_), *_ in self._slot_ranges(excluding):
            if first <= slot <= last:
                return self._node(port)
        raise AssertionError(slot)

    def _current_masters(self) -> list[RedisServer]:
        """Return the nodes that are masters now."""
        return [
            self._node(port) for port in sorted({port for _, _, (_, port, *_), *_ in self._slot_ranges()})
        ]

    def _node(self, port: int) -> RedisServer:
        return next(node for node in self.nodes if node.port == port)

    def _slot_ranges(self, excluding: RedisServer | None = None) -> list[tuple[int, int, list[Any]]]:
        for node in (node for node in self.nodes if node is not excluding):
            with suppress(redis.ConnectionError), node.client() as client:
                ranges: list[tuple[int, int, list[Any]]] = client.execute_command("CLUSTER", "SLOTS")
                return ranges
        message = "no node answers"
        raise AssertionError(message)

    def begin_slot_migration(self, slot: int) -> tuple[RedisServer, RedisServer]:
        """Mark a slot as migrating, without its keys, and return its source and its target."""
        source = self.owner(slot)
        target = next(node for node in self._current_masters() if node is not source)
        with target.client() as to_client, source.client() as from_client:
            to_client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", _node_id(source))
            from_client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", _node_id(target))
        return source, target

    def migrate_keys(self, slot: int, source: RedisServer, target: RedisServer, *, count: int) -> int:
        """Move up to `count` keys of a slot and return how many were moved."""
        with source.client() as client:
            keys = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, count)
            if keys:
                client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end_slot_migration(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """Assign the slot to its new owner on all masters."""
        owner = _node_id(target)
        for node in (target, source, *self._current_masters()):
            with node.client() as client:
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", owner)


@contextmanager
def redis_cluster(
    folder: Path, *args: str, program: str | None = None, tls: bool = False
) -> Iterator[Cluster]:
    """Run a Cluster whose slots are served and whose replicas are in sync."""
    with ExitStack() as stack:
        nodes = []
        bus_ports = [str(free_port()) for _ in range(_NODES)]
        tls_ports = [free_port() for _ in range(_NODES)] if tls else []
        for number in range(_NODES):
            node_folder = folder / str(number)
            node_folder.mkdir()
            settings = [*_SETTINGS, "--cluster-port", bus_ports[number], *args]
            if tls:
                settings += ["--tls-cluster", "yes", "--tls-port", str(tls_ports[number])]
            nodes.append(stack.enter_context(redis_process(node_folder, *settings, program=program)))
        _form_cluster(nodes, bus_ports[0])
        yield Cluster(nodes, tls_ports)


def _form_cluster(nodes: Sequence[RedisServer], first_bus_port: str) -> None:
    slots_per_master = -(-_SLOTS // _MASTERS)
    for number, node in enumerate(nodes):
        with node.client() as client:
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < _MASTERS:
                slots = range(number * slots_per_master, min(_SLOTS, (number + 1) * slots_per_master))
                client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, first_bus_port)
    for node in nodes:
        wait_for(partial(_sees_all_nodes, node), description="the nodes know each other")
    for number, node in enumerate(nodes[_MASTERS:]):
        with node.client() as client:
            client.execute_command("CLUSTER", "REPLICATE", _node_id(nodes[number]))
    for node in nodes:
        wait_for(partial(_is_healthy, node), description="the cluster is whole")
    for node in nodes[_MASTERS:]:
        wait_for(partial(_is_replica_in_sync, node), description="the replicas are in sync")


def _sees_all_nodes(node: RedisServer) -> bool:
    with node.client() as client:
        info = client.execute_command("CLUSTER", "NODES")
    return len(info) == _NODES if isinstance(info, dict) else _decode(info).count("\n") == _NODES


def _decode(reply: object) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def _node_id(node: RedisServer) -> str:
    with node.client() as client:
        return _decode(client.execute_command("CLUSTER", "MYID"))


def _is_healthy(node: RedisServer) -> bool:
    with node.client() as client:
        info = client.execute_command("CLUSTER", "INFO")
    fields = info if isinstance(info, dict) else dict(line.split(":") for line in _decode(info).split())
    return fields["cluster_state"] == "ok" and int(fields["cluster_known_nodes"]) == _NODES


def _is_replica_in_sync(node: RedisServer) -> bool:
    with node.client() as client:
        info = client.info("replication")
    return bool(info.get("role") == "slave" and info.get("master_link_status") == "up")
