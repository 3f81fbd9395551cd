"""The shared queue on a Cluster and behind Sentinels: replicas follow it to another server.

The module is longer than 250 lines, since all its tests check the same things around their fault.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import redis
import redis.asyncio
from prometheus_client import CollectorRegistry
from redis.crc import key_slot

from services.cache_proxy.cache.namespace import cache_keys
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.config.cache_settings import KeySettings
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.serialization import unpack
from services.cache_proxy.redis_client.client_factory import backend_for, create_client
from services.cache_proxy.redis_keys import QueueKeys
from tests.fleet.scenarios import load_callers, send_same_pairs
from tests.fleet.test_faults import BATCH_PAIRS, CALLS_PER_SECOND, FLAGS, MAX_LIMIT_EXCESS_SECONDS, load
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.call_log import LoggedCall, count_inferences, inferences_per_pair, max_limit_excess_seconds
from tests.support.caller import make_pairs, read_metrics
from tests.support.faulty_link import faulty_link
from tests.support.fleet import ProxyGroup, proxy_group
from tests.support.load_callers import LoadStats
from tests.support.processes import ServiceProcess
from tests.support.redis_cluster import Cluster, redis_cluster
from tests.support.redis_sentinel import run_sentinels
from tests.support.redis_server import RedisServer, free_port, redis_process, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(120)]

MASTER_NAME = "cache"
LOST = "the shared queue is lost"
BACK = "the shared queue is back"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, redis_program: str) -> Iterator[Cluster]:
    """Run one Cluster for all tests, each of which leaves it healthy."""
    with redis_cluster(tmp_path_factory.mktemp("cluster"), program=redis_program) as started:
        yield started


@pytest.fixture
def on_cluster(cluster: Cluster, tmp_path: Path) -> Iterator[ProxyGroup]:
    """Run a model stub for replicas on the Cluster. No replica is started."""
    with proxy_group(cluster.url, tmp_path, "--latency", "200ms") as started:
        yield started


def _keys(fleet: ProxyGroup) -> QueueKeys:
    namespace = KeySettings(key_prefix=fleet.key_prefix).namespace
    return QueueKeys(prefix=fleet.key_prefix, namespace=namespace)


def _slot(fleet: ProxyGroup) -> int:
    return int(key_slot(_keys(fleet).limit.encode()))


def _listeners(fleet: ProxyGroup, server: RedisServer) -> int:
    """Return how many of the replicas' own channels have a subscriber at this server."""
    channel = _keys(fleet).channel(0)
    with server.client() as client:
        found = client.pubsub_numsub(*(f"{channel}:{proxy.replica_id}" for proxy in fleet.proxies))
    return sum(count for _, count in found)


async def _wait_until(
    condition: Callable[[], bool], *, description: str, timeout_seconds: float = 30
) -> None:
    await asyncio.to_thread(wait_for, condition, description=description, timeout_seconds=timeout_seconds)


def _is_replica(server: RedisServer) -> bool:
    with server.client() as client:
        info = client.info("replication")
    return bool(info["role"] == "slave" and info["master_link_status"] == "up")


async def _wait_until_empty(fleet: ProxyGroup, server: RedisServer) -> None:
    base = _keys(fleet).base
    with server.client() as client:
        kinds = ("pairs", "claims", "claimed", "suspects")
        await _wait_until(
            lambda: client.exists(*(f"{base}{kind}" for kind in kinds)) == 0,
            description="all pairs have ended",
        )


def _keeps_the_limit(calls: Sequence[LoggedCall]) -> bool:
    rate = CALLS_PER_SECOND * BATCH_PAIRS
    over = max_limit_excess_seconds(calls, pairs_per_second=rate, calls_per_second=CALLS_PER_SECOND)
    return max(over) <= MAX_LIMIT_EXCESS_SECONDS


def _duplicates(
    calls: Sequence[LoggedCall], *, outside: Sequence[tuple[float, float]] = ()
) -> set[tuple[str, str]]:
    """Return the pairs that were inferred twice, without those of calls within the given intervals."""
    excluded = {
        pair
        for call in calls
        for pair in call.pairs
        if any(first <= call.unix_seconds <= last for first, last in outside)
    }
    return {pair for pair, times in count_inferences(calls).items() if times > 1} - excluded


def _all_are_healthy(proxies: Sequence[ServiceProcess]) -> bool:
    """Return whether each replica sees all others and has its queue and its store."""
    readings = [read_metrics(proxy.http_url) for proxy in proxies]
    return all(
        metrics["cache_proxy_live_replicas",] == len(proxies)
        and metrics["cache_proxy_store_up",] == 1
        and proxy.log.count(LOST) == proxy.log.count(BACK)
        for proxy, metrics in zip(proxies, readings, strict=True)
    )


@asynccontextmanager
async def _check_under_load(fleet: ProxyGroup, stats: LoadStats) -> AsyncIterator[list[tuple[float, float]]]:
    """Run three replicas under load and check them at the end of the block.

    Yield a list to which the test adds the intervals (unix seconds) in which a pair may be inferred twice.
    """
    proxies = fleet.start_replicas(3, *FLAGS)
    intervals: list[tuple[float, float]] = []
    await _wait_until(lambda: _all_are_healthy(proxies), description="all know each other")
    async with load(proxies, stats):
        await asyncio.sleep(2)
        yield intervals
        await _wait_until(lambda: _all_are_healthy(proxies), description="all have found the queue again")
        await asyncio.sleep(2)
    calls = fleet.model_calls
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    assert _keeps_the_limit(calls)
    assert not _duplicates(calls, outside=intervals)
    for proxy in proxies:
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_same_pairs_from_many_callers_are_inferred_once_on_a_cluster(
    on_cluster: ProxyGroup, cluster: Cluster
) -> None:
    """Three replicas and six callers with the same 5,000 pairs: each is inferred once, in full calls.

    A second round causes no call. All subscriptions are at the node of the queue.
    """
    proxies = on_cluster.start_replicas(3)
    for again in (False, True):
        stats = await send_same_pairs([proxy.target for proxy in proxies], closed_loop=False)
        assert (stats.wrong_pairs, stats.errors, stats.answered_pairs) == ([], [], 30_000)
        assert inferences_per_pair(on_cluster.model_calls) == 1.0
        assert sum(len(call.pairs) for call in on_cluster.model_calls) == 5000
        assert len(on_cluster.model_calls) <= 7
        assert not (again and stats.misses)
    owner = cluster.owner(_slot(on_cluster))
    assert {node.port: _listeners(on_cluster, node) for node in cluster.nodes if node is not owner} == {
        node.port: 0 for node in cluster.nodes if node is not owner
    }
    assert _listeners(on_cluster, owner) == 3
    assert all(LOST not in proxy.log for proxy in proxies)
    assert [proxy.stop() for proxy in proxies] == [0, 0, 0]


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_published_answers_are_stored_before_on_a_cluster(
    on_cluster: ProxyGroup, cluster: Cluster
) -> None:
    """An answer is in the store when it is published, since the queue's node may be lost afterwards."""
    proxy = on_cluster.start_replica(*UNLIMITED_RATE_FLAGS)
    published: list[bytes] = []
    missing: list[bytes] = []
    backend = backend_for(create_client(cluster.url, timeout_seconds=5))
    base = cache_keys(KeySettings(key_prefix=on_cluster.key_prefix)).base
    store = RedisStore(backend, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))
    # Connect before the first answer is published.
    await store.get([bytes(16)])
    async with (
        redis.asyncio.Redis(port=cluster.owner(_slot(on_cluster)).port) as client,
        client.pubsub(ignore_subscribe_messages=True) as pubsub,
        load_callers([[proxy.target]], LoadStats()) as (caller,),
    ):
        await pubsub.subscribe(_keys(on_cluster).channel(0))
        for number in range(20):
            rpc = asyncio.create_task(caller.infer(make_pairs(f"kept {number}", 5)))
            while len(published) < 5 * (number + 1):
                message = await pubsub.get_message(timeout=10)
                if message is not None:
                    levels = unpack(message["data"])[1]
                    digests = [levels[at : at + 16] for at in range(0, len(levels), 17)]
                    found = await store.get(digests)
                    published += digests
                    missing += [digest for digest, entry in zip(digests, found, strict=True) if not entry]
            await rpc
    await store.close()
    assert not missing


@pytest.mark.parametrize(
    ("redis_program", "ending"), [("valkey", "killed"), ("redis", "stopped")], indirect=["redis_program"]
)
async def test_lost_node_of_the_queue_is_replaced_by_its_replica(
    on_cluster: ProxyGroup, cluster: Cluster, ending: str
) -> None:
    """The node is killed, or stopped for long, under load: no wrong answer, no error, and the limit holds.

    Only pairs from the time without the queue are inferred twice. All replicas return and subscribe at the
    new node.
    """
    slot = _slot(on_cluster)
    stats = LoadStats()
    async with _check_under_load(on_cluster, stats) as intervals:
        owner = cluster.owner(slot)
        lost_at = time.time()
        if ending == "killed":
            owner.kill()
        else:
            owner.pause()
        await _wait_until(
            lambda: cluster.owner(slot, excluding=owner) is not owner, description="its replica takes over"
        )
        successor = cluster.owner(slot, excluding=owner)
        await _wait_until(lambda: _listeners(on_cluster, successor) == 3, description="all listen there")
        await _wait_until(
            lambda: _all_are_healthy(on_cluster.proxies), description="all have found the queue again"
        )
        if ending == "stopped":
            # For a moment it still regards itself as the master.
            owner.resume()
        intervals.append((lost_at - 2, time.time() + 1))
    assert all(BACK in proxy.log for proxy in on_cluster.proxies)
    await _wait_until_empty(on_cluster, successor)
    if ending == "killed":
        owner.start()
    await _wait_until(lambda: _is_replica(owner), description="the old master is a replica")


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_migration_of_the_queues_slot_loses_nothing(on_cluster: ProxyGroup, cluster: Cluster) -> None:
    """The slot is migrated three times under load: the queue is not lost and no pair is inferred twice."""
    slot = _slot(on_cluster)
    stats = LoadStats()
    async with _check_under_load(on_cluster, stats):
        for _ in range(3):
            source, target = cluster.begin_slot_migration(slot)
            while cluster.migrate_keys(slot, source, target, count=3):
                pass
            cluster.end_slot_migration(slot, source, target)
            await _wait_until(
                lambda: _listeners(on_cluster, target) == 3,  # noqa: B023
                description="all listen there",
                timeout_seconds=5,
            )
            assert _listeners(on_cluster, source) == 0
            await asyncio.sleep(1)
    assert all(LOST not in proxy.log for proxy in on_cluster.proxies)
    await _wait_until_empty(on_cluster, cluster.owner(slot))


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_unassigned_slot_counts_as_a_lost_queue(tmp_path: Path, redis_program: str) -> None:
    """A proxy answers while the slot of the queue has no node, and finds the queue once it has one."""
    with (
        redis_process(
            tmp_path,
            "--cluster-enabled",
            "yes",
            "--cluster-require-full-coverage",
            "no",
            "--cluster-node-timeout",
            "1000",
            "--cluster-port",
            str(free_port()),
            program=redis_program,
        ) as node,
        proxy_group(f"redis+cluster://127.0.0.1:{node.port}", tmp_path) as fleet,
        node.client() as client,
    ):
        proxy = fleet.start_replica(*UNLIMITED_RATE_FLAGS)
        stats = LoadStats()

        def has_found_queue() -> bool:
            metrics = read_metrics(proxy.http_url)
            is_up = metrics["cache_proxy_store_up",] == 1 and metrics["cache_proxy_live_replicas",] == 1
            return is_up and _listeners(fleet, node) == 1 and proxy.log.count(LOST) == proxy.log.count(BACK)

        async with load_callers([[proxy.target]], stats) as (caller,):
            await caller.infer(make_pairs("before", 5))
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await _wait_until(has_found_queue, description="it finds the queue")
            await caller.infer(make_pairs("then", 5))
            client.execute_command("CLUSTER", "DELSLOTS", _slot(fleet))
            await _wait_until(lambda: proxy.log.count(LOST) == 2, description="it has lost the queue")
            await caller.infer(make_pairs("without", 5))
            client.execute_command("CLUSTER", "ADDSLOTS", _slot(fleet))
            await _wait_until(has_found_queue, description="it finds the queue again")
            await caller.infer(make_pairs("after", 5))
        assert (stats.wrong_pairs, stats.errors, stats.retries) == ([], [], 0)
        assert inferences_per_pair(fleet.model_calls) == 1.0
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_failover_by_sentinels_is_followed(tmp_path: Path, redis_program: str) -> None:
    """The master is killed, then a failover is requested: no wrong answer, no error, and all return."""
    with ExitStack() as stack:
        servers = _replicated(stack, tmp_path, 3, redis_program)
        ports = stack.enter_context(
            run_sentinels(
                tmp_path, master_port=servers[0].port, master_name=MASTER_NAME, program=redis_program
            )
        )
        url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/{MASTER_NAME}"
        fleet = stack.enter_context(proxy_group(url, tmp_path, "--latency", "200ms"))
        stats = LoadStats()

        def master() -> RedisServer:
            with redis.Redis(port=ports[0]) as client:
                found = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)
            return next(server for server in servers if server.port == int(found[1]))

        async with _check_under_load(fleet, stats) as intervals:
            for crash in (True, False):
                old = master()
                lost_at = time.time()
                if crash:
                    old.kill()
                else:
                    with redis.Redis(port=ports[0]) as client:
                        client.sentinel_failover(MASTER_NAME)
                await _wait_until(lambda: master() is not old, description="another is the master")  # noqa: B023
                await _wait_until(lambda: _listeners(fleet, master()) == 3, description="all listen there")
                await _wait_until(
                    lambda: _all_are_healthy(fleet.proxies), description="all have found the queue again"
                )
                intervals.append((lost_at - 2, time.time() + 1))
                if crash:
                    old.start()
                await _wait_until(lambda: _is_replica(old), description="the old master is a replica")  # noqa: B023
        await _wait_until_empty(fleet, master())


def _replicated(stack: ExitStack, folder: Path, count: int, program: str) -> list[RedisServer]:
    """Start servers, all but the first of them replicas of the first."""
    servers: list[RedisServer] = []
    for number in range(count):
        server_folder = folder / f"server{number}"
        server_folder.mkdir()
        settings = [
            "--repl-diskless-sync-delay",
            "0",
            "--repl-ping-replica-period",
            "1",
            "--appendonly",
            "no",
        ]
        if servers:
            settings += ["--replicaof", f"127.0.0.1 {servers[0].port}"]
        servers.append(stack.enter_context(redis_process(server_folder, *settings, program=program)))
    for server in servers[1:]:
        wait_for(lambda: _is_replica(server), description="the replicas are in sync")  # noqa: B023
    return servers


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_demoted_server_behind_one_address_is_left(tmp_path: Path, redis_program: str) -> None:
    """Open connections to a server that now replies READONLY are closed. The queue is not lost."""
    with ExitStack() as stack:
        old, new = _replicated(stack, tmp_path, 2, redis_program)
        link = stack.enter_context(faulty_link(old.port))
        fleet = stack.enter_context(proxy_group(link.url, tmp_path, "--latency", "200ms"))
        stats = LoadStats()
        async with _check_under_load(fleet, stats) as intervals:
            demoted_at = time.time()
            with old.client() as demoted, new.client() as promoted:
                demoted.execute_command("CLIENT", "PAUSE", 300, "WRITE")
                link.redirect(new.port)
                promoted.execute_command("REPLICAOF", "NO", "ONE")
                demoted.execute_command("REPLICAOF", "127.0.0.1", new.port)
                demoted.execute_command("CLIENT", "UNPAUSE")
            intervals.append((demoted_at - 1, time.time() + 1))
            await _wait_until(
                lambda: _listeners(fleet, new) == 3, description="all listen there", timeout_seconds=10
            )
            assert _listeners(fleet, old) == 0
        await _wait_until_empty(fleet, new)
        assert all(LOST not in proxy.log for proxy in fleet.proxies)
