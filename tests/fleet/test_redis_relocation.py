"""The shared queue on a Cluster and behind Sentinels: where it goes, the replicas follow."""

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
from tests.fleet.test_faults import BATCH_PAIRS, CALLS_PER_SECOND, FLAGS, SEEN_LATE_SECONDS, load
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.call_log import LoggedCall, count_inferences, inferences_per_pair, max_limit_excess_seconds
from tests.support.caller import make_pairs, read_metrics
from tests.support.faulty_link import faulty_link
from tests.support.fleet import ProxyGroup, proxy_group
from tests.support.load_callers import LoadStats
from tests.support.processes import ServiceProcess
from tests.support.redis_cluster import Cluster, redis_cluster, run_sentinels
from tests.support.redis_server import RedisServer, free_port, redis_process, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(120)]

SERVICE = "cache"
LOST, BACK = "the shared queue is lost", "the shared queue is back"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, redis_program: str) -> Iterator[Cluster]:
    """One Cluster for all tests: each leaves it whole."""
    with redis_cluster(tmp_path_factory.mktemp("cluster"), program=redis_program) as made:
        yield made


@pytest.fixture
def on_cluster(cluster: Cluster, tmp_path: Path) -> Iterator[ProxyGroup]:
    """The stub, and no replica yet."""
    with proxy_group(cluster.url, tmp_path, "--latency", "200ms") as made:
        yield made


def _keys(fleet: ProxyGroup) -> QueueKeys:
    namespace = KeySettings(key_prefix=fleet.key_prefix).namespace
    return QueueKeys(prefix=fleet.key_prefix, namespace=namespace)


def _slot(fleet: ProxyGroup) -> int:
    return int(key_slot(_keys(fleet).limit.encode()))


def _listeners(fleet: ProxyGroup, server: RedisServer) -> int:
    """How many of the replicas' own channels have a subscriber at this server."""
    channel = _keys(fleet).channel(0)
    with server.client() as client:
        found = client.pubsub_numsub(*(f"{channel}:{proxy.replica_id}" for proxy in fleet.proxies))
    return sum(count for _, count in found)


async def _until(condition: Callable[[], bool], *, what: str, seconds: float = 30) -> None:
    await asyncio.to_thread(wait_for, condition, description=what, timeout_seconds=seconds)


def _is_replica(server: RedisServer) -> bool:
    with server.client() as client:
        info = client.info("replication")
    return bool(info["role"] == "slave" and info["master_link_status"] == "up")


async def _nothing_is_stuck(fleet: ProxyGroup, server: RedisServer) -> None:
    base = _keys(fleet).base
    with server.client() as client:
        kinds = ("pairs", "claims", "claimed", "suspects")
        await _until(
            lambda: client.exists(*(f"{base}{kind}" for kind in kinds)) == 0, what="all pairs have ended"
        )


def _is_paced(calls: Sequence[LoggedCall]) -> bool:
    rate = CALLS_PER_SECOND * BATCH_PAIRS
    over = max_limit_excess_seconds(calls, pairs_per_second=rate, calls_per_second=CALLS_PER_SECOND)
    return max(over) <= SEEN_LATE_SECONDS


def _twice(calls: Sequence[LoggedCall], *, but: Sequence[tuple[float, float]] = ()) -> set[tuple[str, str]]:
    """The pairs that were sent twice, none of it within these spans of time."""
    excused = {
        pair
        for call in calls
        for pair in call.pairs
        if any(first <= call.unix_seconds <= last for first, last in but)
    }
    return {pair for pair, times in count_inferences(calls).items() if times > 1} - excused


def _all_are_well(proxies: Sequence[ServiceProcess]) -> bool:
    """Whether each knows that all are there, and has its queue and its store."""
    found = [read_metrics(proxy.http_url) for proxy in proxies]
    return all(
        figures["cache_proxy_live_replicas",] == len(proxies)
        and figures["cache_proxy_store_up",] == 1
        and proxy.log.count(LOST) == proxy.log.count(BACK)
        for proxy, figures in zip(proxies, found, strict=True)
    )


@asynccontextmanager
async def _trouble(fleet: ProxyGroup, tally: LoadStats) -> AsyncIterator[list[tuple[float, float]]]:
    """Three replicas under load; the caller notes from when until when a pair may be asked twice."""
    proxies = fleet.start_replicas(3, *FLAGS)
    spans: list[tuple[float, float]] = []
    await _until(lambda: _all_are_well(proxies), what="all know each other")
    async with load(proxies, tally):
        await asyncio.sleep(2)
        yield spans
        await _until(lambda: _all_are_well(proxies), what="all have found the queue again")
        await asyncio.sleep(2)
    calls = fleet.model_calls
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    assert _is_paced(calls)
    assert not _twice(calls, but=spans)
    for proxy in proxies:
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_the_same_pairs_from_many_callers_are_inferred_once_on_a_cluster(
    on_cluster: ProxyGroup, cluster: Cluster
) -> None:
    """Three replicas, six callers, the same 5,000 pairs: each once, in full calls, then never again.

    Whoever listens does so at the node of the queue.
    """
    proxies = on_cluster.start_replicas(3)
    for again in (False, True):
        tally = await send_same_pairs([proxy.target for proxy in proxies], closed_loop=False)
        assert (tally.wrong_pairs, tally.errors, tally.answered_pairs) == ([], [], 30_000)
        assert inferences_per_pair(on_cluster.model_calls) == 1.0
        assert sum(len(call.pairs) for call in on_cluster.model_calls) == 5000
        assert len(on_cluster.model_calls) <= 7
        assert not (again and tally.misses)
    owner = cluster.owner(_slot(on_cluster))
    assert {node.port: _listeners(on_cluster, node) for node in cluster.nodes if node is not owner} == {
        node.port: 0 for node in cluster.nodes if node is not owner
    }
    assert _listeners(on_cluster, owner) == 3
    assert all(LOST not in proxy.log for proxy in proxies)
    assert [proxy.stop() for proxy in proxies] == [0, 0, 0]


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_what_a_cluster_publishes_it_has_kept_already(on_cluster: ProxyGroup, cluster: Cluster) -> None:
    """Whoever hears of an answer finds it in the store: the queue's node may be lost, and its memory."""
    proxy = on_cluster.start_replica(*UNLIMITED_RATE_FLAGS)
    heard: list[bytes] = []
    missing: list[bytes] = []
    reached = backend_for(create_client(cluster.url, timeout_seconds=5))
    base = cache_keys(KeySettings(key_prefix=on_cluster.key_prefix)).base
    store = RedisStore(reached, base_key=base, metrics=ProxyMetrics(CollectorRegistry()))
    await store.get([bytes(16)])  # connects
    async with (
        redis.asyncio.Redis(port=cluster.owner(_slot(on_cluster)).port) as client,
        client.pubsub(ignore_subscribe_messages=True) as pubsub,
        load_callers([[proxy.target]], LoadStats()) as (one,),
    ):
        await pubsub.subscribe(_keys(on_cluster).channel(0))
        for number in range(20):
            asking = asyncio.create_task(one.infer(make_pairs(f"kept {number}", 5)))
            while len(heard) < 5 * (number + 1):
                message = await pubsub.get_message(timeout=10)
                if message is not None:
                    levels = unpack(message["data"])[1]
                    digests = [levels[at : at + 16] for at in range(0, len(levels), 17)]
                    found = await store.get(digests)
                    heard += digests
                    missing += [digest for digest, entry in zip(digests, found, strict=True) if not entry]
            await asking
    await store.close()
    assert not missing


@pytest.mark.parametrize(
    ("redis_program", "ending"), [("valkey", "killed"), ("redis", "stopped")], indirect=["redis_program"]
)
async def test_the_node_of_the_queue_is_gone_and_its_replica_takes_over(
    on_cluster: ProxyGroup, cluster: Cluster, ending: str
) -> None:
    """Killed, or stopped for long, under load: nothing wrong, nobody fails, and the limit holds.

    Only what was asked while the queue was lost is asked twice; all return, and listen at the new node.
    """
    slot, tally = _slot(on_cluster), LoadStats()
    async with _trouble(on_cluster, tally) as spans:
        owner, began = cluster.owner(slot), time.time()
        if ending == "killed":
            owner.kill()
        else:
            owner.pause()
        await _until(lambda: cluster.owner(slot, excluding=owner) is not owner, what="its replica takes over")
        successor = cluster.owner(slot, excluding=owner)
        await _until(lambda: _listeners(on_cluster, successor) == 3, what="all listen there")
        await _until(lambda: _all_are_well(on_cluster.proxies), what="all have found the queue again")
        if ending == "stopped":
            owner.resume()  # and believes for a moment that it is the master still
        spans.append((began - 2, time.time() + 1))
    assert all(BACK in proxy.log for proxy in on_cluster.proxies)
    await _nothing_is_stuck(on_cluster, successor)
    if ending == "killed":
        owner.start()
    await _until(lambda: _is_replica(owner), what="the old master is a replica")


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_the_slot_of_the_queue_is_moved(on_cluster: ProxyGroup, cluster: Cluster) -> None:
    """Thrice under load: the queue is not lost, no pair is asked twice, and all listen at the new node."""
    slot, tally = _slot(on_cluster), LoadStats()
    async with _trouble(on_cluster, tally):
        for _ in range(3):
            source, target = cluster.begin_slot_migration(slot)
            while cluster.migrate_keys(slot, source, target, count=3):
                pass
            cluster.end_slot_migration(slot, source, target)
            await _until(lambda: _listeners(on_cluster, target) == 3, what="all listen there", seconds=5)  # noqa: B023
            assert _listeners(on_cluster, source) == 0
            await asyncio.sleep(1)
    assert all(LOST not in proxy.log for proxy in on_cluster.proxies)
    await _nothing_is_stuck(on_cluster, cluster.owner(slot))


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_slot_that_nobody_has_is_a_queue_that_is_lost(tmp_path: Path, redis_program: str) -> None:
    """Before a Cluster is made, or its slot is anybody's, a proxy answers; then it finds the queue."""
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
        tally = LoadStats()

        def finds_it() -> bool:
            found = read_metrics(proxy.http_url)
            well = found["cache_proxy_store_up",] == 1 and found["cache_proxy_live_replicas",] == 1
            return well and _listeners(fleet, node) == 1 and proxy.log.count(LOST) == proxy.log.count(BACK)

        async with load_callers([[proxy.target]], tally) as (one,):
            await one.infer(make_pairs("before", 5))
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            await _until(finds_it, what="it finds the queue")
            await one.infer(make_pairs("then", 5))
            client.execute_command("CLUSTER", "DELSLOTS", _slot(fleet))
            await _until(lambda: proxy.log.count(LOST) == 2, what="it has lost the queue")
            await one.infer(make_pairs("without", 5))
            client.execute_command("CLUSTER", "ADDSLOTS", _slot(fleet))
            await _until(finds_it, what="it finds the queue again")
            await one.infer(make_pairs("after", 5))
        assert (tally.wrong_pairs, tally.errors, tally.retries) == ([], [], 0)
        assert inferences_per_pair(fleet.model_calls) == 1.0
        assert "Traceback" not in proxy.log


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_sentinels_make_another_server_the_master(tmp_path: Path, redis_program: str) -> None:
    """Killed, and its successor asked to step down, under load: nothing wrong, nobody fails, all return."""
    with ExitStack() as stack:
        made = _replicated(stack, tmp_path, 3, redis_program)
        ports = stack.enter_context(
            run_sentinels(tmp_path, master_port=made[0].port, master_name=SERVICE, program=redis_program)
        )
        url = f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in ports)}/{SERVICE}"
        fleet = stack.enter_context(proxy_group(url, tmp_path, "--latency", "200ms"))
        tally = LoadStats()

        def master() -> RedisServer:
            with redis.Redis(port=ports[0]) as client:
                found = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
            return next(server for server in made if server.port == int(found[1]))

        async with _trouble(fleet, tally) as spans:
            for crash in (True, False):
                old, began = master(), time.time()
                if crash:
                    old.kill()
                else:
                    with redis.Redis(port=ports[0]) as client:
                        client.sentinel_failover(SERVICE)
                await _until(lambda: master() is not old, what="another is the master")  # noqa: B023
                await _until(lambda: _listeners(fleet, master()) == 3, what="all listen there")
                await _until(lambda: _all_are_well(fleet.proxies), what="all have found the queue again")
                spans.append((began - 2, time.time() + 1))
                if crash:
                    old.start()
                await _until(lambda: _is_replica(old), what="the old master is a replica")  # noqa: B023
        await _nothing_is_stuck(fleet, master())


def _replicated(stack: ExitStack, folder: Path, count: int, program: str) -> list[RedisServer]:
    """Servers, all but the first its replicas."""
    servers: list[RedisServer] = []
    for number in range(count):
        place = folder / f"server{number}"
        place.mkdir()
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
        servers.append(stack.enter_context(redis_process(place, *settings, program=program)))
    for server in servers[1:]:
        wait_for(lambda: _is_replica(server), description="the replicas are in sync")  # noqa: B023 - used at once
    return servers


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
async def test_a_demoted_server_behind_one_address_is_left(tmp_path: Path, redis_program: str) -> None:
    """Open connections to a server that says READONLY by now are dropped; the queue is not lost."""
    with ExitStack() as stack:
        old, new = _replicated(stack, tmp_path, 2, redis_program)
        wire = stack.enter_context(faulty_link(old.port))
        fleet = stack.enter_context(proxy_group(wire.url, tmp_path, "--latency", "200ms"))
        tally = LoadStats()
        async with _trouble(fleet, tally) as spans:
            began = time.time()
            with old.client() as demoted, new.client() as promoted:
                demoted.execute_command("CLIENT", "PAUSE", 300, "WRITE")
                wire.redirect(new.port)
                promoted.execute_command("REPLICAOF", "NO", "ONE")
                demoted.execute_command("REPLICAOF", "127.0.0.1", new.port)
                demoted.execute_command("CLIENT", "UNPAUSE")
            spans.append((began - 1, time.time() + 1))
            await _until(lambda: _listeners(fleet, new) == 3, what="all listen there", seconds=10)
            assert _listeners(fleet, old) == 0
        await _nothing_is_stuck(fleet, new)
        assert all(LOST not in proxy.log for proxy in fleet.proxies)
