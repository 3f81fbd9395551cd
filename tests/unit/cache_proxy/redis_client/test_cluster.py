"""The store on a real Redis Cluster and behind a real Sentinel: moving slots and lost nodes.

One module of more than 250 lines: the tests share one Cluster of six servers, whose start takes seconds.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio.cluster import RedisCluster
from redis.crc import key_slot

from services.cache_proxy.cache.buckets import TAGS, tag_for_digest
from services.cache_proxy.cache.entry import entry_level
from services.cache_proxy.cache.invalidation import InvalidationFollower, InvalidationLog
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import CLIENT_ERRORS, RedisBackend
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from services.cache_proxy.redis_client.node import QueueNode
from services.cache_proxy.redis_keys import tag_state_key
from tests.support.redis_cluster import Cluster, redis_cluster
from tests.support.redis_sentinel import single_sentinel
from tests.support.redis_server import redis_process, wait_for

# Six servers run, and failovers take seconds.
pytestmark = pytest.mark.slow

_bases = (f"cluster{number}:c2:" for number in itertools.count())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield one cluster for all tests; each test restores it."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started


@pytest.fixture
def base() -> str:
    """Return the base key of a namespace for this test only."""
    return next(_bases)


@pytest.fixture
async def backend(cluster: Cluster) -> AsyncIterator[RedisBackend]:
    """Yield the backend for the cluster."""
    opened = backend_for(create_client(cluster.url, timeout_seconds=1))
    yield opened
    await opened.close()


@pytest.fixture
def store(backend: RedisBackend, base: str) -> RedisStore:
    """Return a store on the cluster."""
    return RedisStore(backend, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))


def _pairs(count: int, *, tag: int | None = None) -> dict[bytes, int]:
    """Return the digests and levels of new pairs, all in one tag if one is given."""
    levels = {}
    for number in range(count):
        first = os.urandom(1) if tag is None else bytes((tag * 4 + number % 4,))
        levels[first + os.urandom(15)] = number % 7 + 1
    return levels


async def _levels(store: RedisStore, pairs: dict[bytes, int]) -> list[int]:
    return [entry_level(entry) for entry in await store.get(list(pairs))]


async def test_store_on_cluster_is_spread_over_all_masters(
    cluster: Cluster, store: RedisStore, backend: RedisBackend, base: str
) -> None:
    """All operations work as on a single server, and every master has some of the keys."""
    pairs = _pairs(20_000)
    await store.put(pairs)
    assert await _levels(store, pairs) == list(pairs.values())
    for node in cluster.masters:
        with node.client() as client:
            assert len(list(client.scan_iter(f"{base}*", count=1000))) > 50
    inspections = [await store.inspect(tag, samples=4, start=0.5) for tag in range(TAGS)]
    assert sum(inspection.pairs for inspection in inspections) == 20_000
    assert {encoding for inspection in inspections for encoding, _, _ in inspection.samples} == {"listpack"}
    deleted = list(pairs)[:10]
    kept = dict(list(pairs.items())[10:])
    assert await store.delete(deleted) == 10
    assert await _levels(store, kept) == list(kept.values())
    log = InvalidationLog(backend, f"{base}log")
    removed: list[bytes] = []
    await log.add(deleted)
    await InvalidationFollower(log, remove=removed.append, clear=lambda: removed.append(b"all")).poll()
    assert removed == [b"all"]
    assert await store.clear() == 20_000 - 10
    assert not any(await store.get(list(pairs)))
    for tag in range(TAGS):
        while (await store.sweep(tag, buckets=500)).has_leftovers:
            pass
    for node in cluster.masters:
        with node.client() as client:
            assert len(list(client.scan_iter(f"{base}*", count=1000))) <= TAGS + 1


@pytest.mark.parametrize("moved", ["nothing", "the state", "half", "everything"])
async def test_slot_migration_loses_no_answer(
    cluster: Cluster, store: RedisStore, base: str, moved: str
) -> None:
    """Every answer is found, however many keys of its slot are on the other node (`ASK`, `TRYAGAIN`).

    New answers are pending until the slot has moved. No key is on both nodes, so the migration can end.
    """
    tag = 5
    pairs = _pairs(2000, tag=tag)
    others = _pairs(500, tag=6)
    await store.put(pairs | others)
    resilient = ResilientStore(store, metrics=ProxyMetrics(CollectorRegistry()))
    slot = key_slot(tag_state_key(base, tag).encode())
    source, target = cluster.begin_slot_migration(slot)
    with source.client() as client:
        count = client.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot)
        if moved == "the state":
            client.execute_command("MIGRATE", "127.0.0.1", target.port, tag_state_key(base, tag), 0, 5000)
    cluster.migrate_keys(slot, source, target, count={"half": count // 2, "everything": count}.get(moved, 0))
    assert await _levels(store, pairs | others) == [*pairs.values(), *others.values()]
    new = _pairs(200, tag=tag) | _pairs(200)
    await resilient.put(new)
    assert resilient.available
    assert list(await resilient.get_levels(list(new))) == list(new.values())
    while cluster.migrate_keys(slot, source, target, count=50):
        assert await _levels(store, pairs) == list(pairs.values())
    cluster.end_slot_migration(slot, source, target)
    await _wait_until_stored(store, new)
    assert await _levels(store, pairs | others) == [*pairs.values(), *others.values()]
    await resilient.close()


async def test_lost_master_under_load_loses_no_stored_answer(
    cluster: Cluster, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A master is killed while answers are looked up and written.

    Answers on the other nodes are found all the time, no answer is wrong, and the store stays available.
    After the failover to the replica all answers are found. Pairs that could not be read are counted, and the
    failure is logged once.
    """
    caplog.set_level("INFO", logger="services.cache_proxy.cache.redis_store")
    known = _pairs(5000)
    await store.put(known)
    resilient = ResilientStore(store, metrics=ProxyMetrics(CollectorRegistry()))
    with cluster.masters[1].client() as client:
        assert client.wait(1, 5000) == 1
    written: dict[bytes, int] = {}
    stop = asyncio.Event()
    min_found = len(known)

    async def load() -> None:
        nonlocal min_found
        while not stop.is_set():
            levels = await resilient.get_levels(list(known))
            assert all(level in (0, known[digest]) for digest, level in zip(known, levels, strict=True))
            min_found = min(min_found, sum(map(bool, levels)))
            new = _pairs(20)
            await resilient.put(new)
            written.update(new)
            await asyncio.sleep(0.01)

    loads = [asyncio.create_task(load()) for _ in range(3)]
    cluster.masters[1].kill()
    async with asyncio.timeout(30):
        while min_found == len(known):  # noqa: ASYNC110 - no event to await
            await asyncio.sleep(0.01)
    await _wait_until_stored(store, known)
    stop.set()
    await asyncio.gather(*loads)
    assert min_found > len(known) // 2
    assert resilient.available
    assert store._metrics.store_unread_pairs._value.get() >= len(known) - min_found
    logged = [record.message.partition(";")[0] for record in caplog.records if "Cluster" in record.message]
    assert logged == ["a part of the Cluster does not reply", "all of the Cluster replies again"]
    await _wait_until_stored(store, written)
    await resilient.close()
    cluster.masters[1].start()
    wait_for(lambda: _is_replica(cluster, 1), description="the old master is a replica", timeout_seconds=30)


async def _wait_until_stored(store: RedisStore, pairs: dict[bytes, int]) -> None:
    """Poll until the store has all pairs; errors before that are ignored."""
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(StoreError):
                if await _levels(store, pairs) == list(pairs.values()):
                    return
            await asyncio.sleep(0.1)


def _is_replica(cluster: Cluster, number: int) -> bool:
    with cluster.masters[number].client() as client:
        info = client.info("replication")
    return bool(info["role"] == "slave" and info["master_link_status"] == "up")


async def test_connection_dropped_at_any_moment_is_reported_as_lost_node(cluster: Cluster) -> None:
    """A connection is dropped at each step of a command, as redis-py does for a node that left.

    The command replies or raises `StoreError`; a subscription raises one of `CLIENT_ERRORS`.
    """
    client = create_client(cluster.url, timeout_seconds=1)
    assert isinstance(client, RedisCluster)
    backend = backend_for(client)
    node = QueueNode(client, key="dropped")
    await backend.execute("dropped", "GET", "dropped")

    async def subscribe() -> None:
        async with await node.create_pubsub() as pubsub:
            await pubsub.subscribe("channel")
            await node.memory_info()

    outcomes: list[BaseException | None] = []
    # Drop at every step, and repeat until a send met the dropped connection, which is a matter of luck.
    while not any(isinstance(error, AttributeError) for error in outcomes):
        for steps in range(120):
            tasks = [
                asyncio.create_task(backend.execute("dropped", "GET", "dropped")),
                asyncio.create_task(subscribe()),
            ]
            for _ in range(steps):
                await asyncio.sleep(0)
            await client.nodes_manager.get_node_from_slot(client.keyslot("dropped")).disconnect()
            outcomes += await asyncio.gather(*tasks, return_exceptions=True)
    await backend.close()
    assert None in outcomes
    assert [
        error for error in outcomes if error and not isinstance(error, (StoreError, *CLIENT_ERRORS))
    ] == []


async def test_unreachable_cluster_raises_store_errors(base: str) -> None:
    """Every operation fails soon, with `StoreError` and no other exception."""
    store = RedisStore(
        backend_for(create_client("redis+cluster://127.0.0.1:1,127.0.0.1:2", timeout_seconds=0.5)),
        base_key=base,
        metrics=ProxyMetrics(CollectorRegistry()),
    )
    for operation in (store.get([bytes(16)]), store.put({bytes(16): 1}), store.clear()):
        with pytest.raises(StoreError):
            await asyncio.wait_for(operation, 5)
    await store.close()


async def test_store_behind_sentinel_follows_the_master(tmp_path: Path, base: str) -> None:
    """After the master is killed, its replica serves the answers and takes new ones."""
    folders = [tmp_path / name for name in ("master", "replica", "sentinel")]
    for folder in folders:
        folder.mkdir()
    with redis_process(folders[0]) as master:
        replica_of = ("--replicaof", f"127.0.0.1 {master.port}", "--repl-diskless-sync-delay", "0")
        with (
            redis_process(folders[1], *replica_of) as replica,
            single_sentinel(folders[2], master_port=master.port, master_name="cache") as port,
        ):
            url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/cache"
            backend = backend_for(create_client(url, timeout_seconds=1))
            store = RedisStore(backend, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))
            pairs = _pairs(500)
            await store.put(pairs)
            with master.client() as client:
                assert client.wait(1, 5000) == 1
            master.kill()
            await _wait_until_stored(store, pairs)
            more = _pairs(500)
            await store.put(more)
            assert await _levels(store, more) == list(more.values())
            assert all(tag_for_digest(digest) < TAGS for digest in more)
            with replica.client() as client:
                assert client.info("replication")["role"] == "master"
            await store.close()


@pytest.mark.slow
async def test_cluster_with_all_addresses_changed_is_found_by_configured_node(
    tmp_path: Path, base: str
) -> None:
    """All known nodes are lost; the configured name leads to new addresses, and the store recovers."""
    target_port = 0

    async def forward(from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            from_node, to_node = await asyncio.open_connection("127.0.0.1", target_port)
            await asyncio.gather(_copy(from_client, to_node), _copy(from_node, to_client))
        to_client.close()

    configured = await asyncio.start_server(forward, "127.0.0.1", 0)
    port = configured.sockets[0].getsockname()[1]
    backend = backend_for(create_client(f"redis+cluster://127.0.0.1:{port}", timeout_seconds=1))
    store = RedisStore(backend, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with redis_cluster(tmp_path / name) as cluster:
            target_port = cluster.nodes[0].port
            pairs = _pairs(100)
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(StoreError):
                        await store.put(pairs)
                        break
                    await asyncio.sleep(0.1)
            await _wait_until_stored(store, pairs)
        with pytest.raises(StoreError):
            await store.get(list(pairs))
    await store.close()
    configured.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            sink.write(data)
    sink.close()
