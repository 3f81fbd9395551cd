"""The store on a real Redis Cluster and behind a real Sentinel: slots that move, nodes that die."""

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
from tests.support.redis_cluster import Cluster, redis_cluster, single_sentinel
from tests.support.redis_server import redis_process, wait_for

pytestmark = pytest.mark.slow  # six servers, and failovers take seconds

_bases = (f"cluster{number}:c2:" for number in itertools.count())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for all tests: each leaves it whole."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def base() -> str:
    """The base of a namespace of the test's own."""
    return next(_bases)


@pytest.fixture
async def backend(cluster: Cluster) -> AsyncIterator[RedisBackend]:
    """The cluster, as the store sees it."""
    opened = backend_for(create_client(cluster.url, timeout_seconds=1))
    yield opened
    await opened.close()


@pytest.fixture
def store(backend: RedisBackend, base: str) -> RedisStore:
    """A store on the cluster."""
    return RedisStore(backend, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))


def _pairs(count: int, *, tag: int | None = None) -> dict[bytes, int]:
    """New pairs, all of a tag if one is given."""
    made = {}
    for number in range(count):
        first = os.urandom(1) if tag is None else bytes((tag * 4 + number % 4,))
        made[first + os.urandom(15)] = number % 7 + 1
    return made


async def _levels(store: RedisStore, pairs: dict[bytes, int]) -> list[int]:
    return [entry_level(entry) for entry in await store.get(list(pairs))]


async def test_the_store_is_spread_over_the_nodes_and_answers_as_one(
    cluster: Cluster, store: RedisStore, backend: RedisBackend, base: str
) -> None:
    """Look-ups, writes, growth, sweep, forgetting and clearing do what they do elsewhere, and every master
    has its part.
    """  # noqa: D205 - one thought
    pairs = _pairs(20_000)
    await store.put(pairs)
    assert await _levels(store, pairs) == list(pairs.values())
    for node in cluster.masters:
        with node.client() as client:
            assert len(list(client.scan_iter(f"{base}*", count=1000))) > 50
    found = [await store.inspect(tag, samples=4, start=0.5) for tag in range(TAGS)]
    assert sum(tag.pairs for tag in found) == 20_000
    assert {name for tag in found for name, _, _ in tag.samples} == {"listpack"}
    gone, kept = list(pairs)[:10], dict(list(pairs.items())[10:])
    assert await store.delete(gone) == 10
    assert await _levels(store, kept) == list(kept.values())
    log = InvalidationLog(backend, f"{base}log")
    told: list[bytes] = []
    await log.add(gone)
    await InvalidationFollower(log, remove=told.append, clear=lambda: told.append(b"all")).poll()
    assert told == [b"all"]
    assert await store.clear() == 20_000 - 10
    assert not any(await store.get(list(pairs)))
    for tag in range(TAGS):
        while (await store.sweep(tag, buckets=500)).has_leftovers:
            pass
    for node in cluster.masters:
        with node.client() as client:
            assert len(list(client.scan_iter(f"{base}*", count=1000))) <= TAGS + 1


@pytest.mark.parametrize("moved", ["nothing", "the state", "half", "everything"])
async def test_a_slot_on_its_way_loses_no_answer(
    cluster: Cluster, store: RedisStore, base: str, moved: str
) -> None:
    """However many of its keys are on the other node, every answer of the slot is found (`ASK`, `TRYAGAIN`);
    new ones are kept and written when it has arrived; nothing is written twice, so the move can end.
    """  # noqa: D205 - one thought
    tag = 5
    pairs, others = _pairs(2000, tag=tag), _pairs(500, tag=6)
    await store.put(pairs | others)
    guarded = ResilientStore(store, metrics=ProxyMetrics(CollectorRegistry()))
    slot = key_slot(tag_state_key(base, tag).encode())
    source, target = cluster.begin_slot_migration(slot)
    with source.client() as client:
        count = client.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot)
        if moved == "the state":
            client.execute_command("MIGRATE", "127.0.0.1", target.port, tag_state_key(base, tag), 0, 5000)
    cluster.migrate_keys(slot, source, target, count={"half": count // 2, "everything": count}.get(moved, 0))
    assert await _levels(store, pairs | others) == [*pairs.values(), *others.values()]
    new = _pairs(200, tag=tag) | _pairs(200)
    await guarded.put(new)
    assert guarded.available
    assert list(await guarded.get_levels(list(new))) == list(new.values())
    while cluster.migrate_keys(slot, source, target, count=50):
        assert await _levels(store, pairs) == list(pairs.values())
    cluster.end_slot_migration(slot, source, target)
    await _until_known(store, new)
    assert await _levels(store, pairs | others) == [*pairs.values(), *others.values()]
    await guarded.close()


async def test_a_node_that_dies_under_load_costs_no_answer_that_was_saved(
    cluster: Cluster, store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    """A master is killed while answers are looked up and written: what the other nodes have is found all the
    time, nothing found is wrong, the store never counts as down, and all is there once the replica took over.
    What could not be looked up is counted, and logged once.
    """  # noqa: D205 - one thought
    caplog.set_level("INFO", logger="services.cache_proxy.cache.redis_store")
    known = _pairs(5000)
    await store.put(known)
    guarded = ResilientStore(store, metrics=ProxyMetrics(CollectorRegistry()))
    with cluster.masters[1].client() as client:
        assert client.wait(1, 5000) == 1
    written: dict[bytes, int] = {}
    stop = asyncio.Event()
    least = len(known)

    async def load() -> None:
        nonlocal least
        while not stop.is_set():
            found = await guarded.get_levels(list(known))
            assert all(level in (0, known[digest]) for digest, level in zip(known, found, strict=True))
            least = min(least, sum(map(bool, found)))
            new = _pairs(20)
            await guarded.put(new)
            written.update(new)
            await asyncio.sleep(0.01)

    loads = [asyncio.create_task(load()) for _ in range(3)]
    cluster.masters[1].kill()
    async with asyncio.timeout(30):
        while least == len(known):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
    await _until_known(store, known)
    stop.set()
    await asyncio.gather(*loads)
    assert least > len(known) // 2
    assert guarded.available
    assert store._metrics.store_unread_pairs._value.get() >= len(known) - least
    told = [record.message.partition(";")[0] for record in caplog.records if "Cluster" in record.message]
    assert told == ["a part of the Cluster does not reply", "all of the Cluster replies again"]
    await _until_known(store, written)
    await guarded.close()
    cluster.masters[1].start()
    wait_for(lambda: _is_replica(cluster, 1), description="the old master is a replica", timeout_seconds=30)


async def _until_known(store: RedisStore, pairs: dict[bytes, int]) -> None:
    """Until the store has all of them, whatever it raises meanwhile."""
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


async def test_a_connection_that_is_dropped_at_any_moment_is_a_node_that_was_lost(cluster: Cluster) -> None:
    """As redis-py drops those of a node that left: a command is answered or a store's failure, at whatever
    step of it that comes, and a subscription fails by what its reader is ready for.
    """  # noqa: D205 - one thought
    client = create_client(cluster.url, timeout_seconds=1)
    assert isinstance(client, RedisCluster)
    backend, home = backend_for(client), QueueNode(client, key="dropped")
    await backend.execute("dropped", "GET", "dropped")

    async def subscribe() -> None:
        async with await home.create_pubsub() as pubsub:
            await pubsub.subscribe("channel")
            await home.memory_info()

    outcomes: list[BaseException | None] = []
    # Every step, and again until the moment that this is about was met: that is a matter of luck.
    while not any(isinstance(error, AttributeError) for error in outcomes):
        for steps in range(120):
            working = [
                asyncio.create_task(backend.execute("dropped", "GET", "dropped")),
                asyncio.create_task(subscribe()),
            ]
            for _ in range(steps):
                await asyncio.sleep(0)
            await client.nodes_manager.get_node_from_slot(client.keyslot("dropped")).disconnect()
            outcomes += await asyncio.gather(*working, return_exceptions=True)
    await backend.close()
    assert None in outcomes
    assert [
        error for error in outcomes if error and not isinstance(error, (StoreError, *CLIENT_ERRORS))
    ] == []


async def test_a_cluster_that_cannot_be_reached_is_a_store_that_is_down(base: str) -> None:
    """Errors of the store, and nothing else, and soon."""
    store = RedisStore(
        backend_for(create_client("redis+cluster://127.0.0.1:1,127.0.0.1:2", timeout_seconds=0.5)),
        base_key=base,
        metrics=ProxyMetrics(CollectorRegistry()),
    )
    for operation in (store.get([bytes(16)]), store.put({bytes(16): 1}), store.clear()):
        with pytest.raises(StoreError):
            await asyncio.wait_for(operation, 5)
    await store.close()


async def test_behind_a_sentinel_the_store_follows_the_master(tmp_path: Path, base: str) -> None:
    """The master dies, its replica is made master: the answers are there, and new ones are written."""
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
            opened = backend_for(create_client(url, timeout_seconds=1))
            store = RedisStore(opened, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))
            pairs = _pairs(500)
            await store.put(pairs)
            with master.client() as client:
                assert client.wait(1, 5000) == 1
            master.kill()
            await _until_known(store, pairs)
            more = _pairs(500)
            await store.put(more)
            assert await _levels(store, more) == list(more.values())
            assert all(tag_for_digest(digest) < TAGS for digest in more)
            with replica.client() as client:
                assert client.info("replication")["role"] == "master"
            await store.close()


@pytest.mark.slow
async def test_a_cluster_whose_nodes_all_come_back_elsewhere_is_found_by_its_named_node(
    tmp_path: Path, base: str
) -> None:
    """Every node that was known is gone; what the settings name leads to new addresses: the store is back."""
    target = 0

    async def pass_on(near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far, forth = await asyncio.open_connection("127.0.0.1", target)
            await asyncio.gather(_copy(near, forth), _copy(far, back))
        back.close()

    named = await asyncio.start_server(pass_on, "127.0.0.1", 0)
    port = named.sockets[0].getsockname()[1]
    opened = backend_for(create_client(f"redis+cluster://127.0.0.1:{port}", timeout_seconds=1))
    store = RedisStore(opened, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with redis_cluster(tmp_path / name) as made:
            target = made.nodes[0].port
            pairs = _pairs(100)
            async with asyncio.timeout(30):
                while True:
                    with contextlib.suppress(StoreError):
                        await store.put(pairs)
                        break
                    await asyncio.sleep(0.1)
            await _until_known(store, pairs)
        with pytest.raises(StoreError):
            await store.get(list(pairs))
    await store.close()
    named.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(65_536):
            sink.write(data)
    sink.close()
