"""A replica that Redis refuses a right, a login or a command beside others that have all they need."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
import redis

from services.cache_proxy.errors import ModelUnavailableError, StoreAccessDeniedError, StoreError
from services.cache_proxy.redis_client.access_check import AccessCheck
from services.cache_proxy.redis_client.backend import is_access_denied
from services.cache_proxy.redis_client.client_factory import RedisCredentials, backend_for, create_client
from services.cache_proxy.redis_client.node import QueueNode
from services.cache_proxy.redis_keys import QueueKeys
from services.model_stub.levels import infer_level
from tests.support.caller import open_caller, read_metrics
from tests.support.fleet import Fleet
from tests.support.processes import ROOT, ServiceProcess, cache_proxy, model_stub
from tests.support.redis_cluster import redis_cluster
from tests.support.redis_server import PROGRAMS, RedisServer, redis_process, wait_for
from tests.support.replicas import QueueLocation, numbered_pairs, replicas

pytestmark = pytest.mark.slow

_USERS = (ROOT / "deploy/redis/users.acl").read_text()
_RULES = next(line for line in _USERS.splitlines() if line.startswith("user seniority ")).split()[2:]
RIGHTS = sorted(rule[1:] for rule in _RULES if rule.startswith("+"))
NOT_FOR_SERVE = {
    "memory|usage",
    "object|encoding",  # `stats` alone uses them
    "cluster|slots",
    "cluster|shards",
    "command",
    "asking",  # of a Cluster
    "select",
    "auth",
    "client|setname",  # of a URL with a database, and of other protocols
    "expire",
    "unsubscribe",
    "ping",
    "hello",  # hello is allowed to everybody
}
_QUEUE_LUA = ROOT / "services/cache_proxy/queue/lua"
QUEUE_COMMANDS = sorted(
    {
        name
        for path in _QUEUE_LUA.glob("*.lua")
        for name in re.findall(r"(?:call|in_chunks)\('([A-Z]+)'", path.read_text())
    }
)
QUEUE_RIGHTS = [f"-{name.lower()}" for name in QUEUE_COMMANDS]
UNPACED = ("--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "1ms")


@pytest.fixture(scope="module", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server of each kind for many checks."""
    program = PROGRAMS[request.param]
    if program is None:
        pytest.skip(f"{request.param} is not installed")
    with redis_process(tmp_path_factory.mktemp("rights"), program=program) as started:
        yield started


def _rules(prefix: str) -> list[str]:
    """Return the rules of deploy/redis for a deployment of this prefix, with the password `s3cret`."""
    return [rule.replace("seniority", prefix).replace("CHANGE-ME", "s3cret") for rule in _RULES]


async def _check(server: RedisServer, user: str, prefix: str, password: bytes = b"s3cret") -> None:
    client = create_client(
        server.url, timeout_seconds=5, credentials=RedisCredentials(username=user, password=password)
    )
    keys = QueueKeys(prefix=prefix, namespace="n")
    home = QueueNode(client, key=keys.limit, user=user)
    check = AccessCheck(
        node=home,
        key_prefixes=[keys.limit, keys.base, f"{prefix}:c2:n:{{00}}"],
        channel=keys.channel(0),
        user=user,
    )
    try:
        await check.run()
    finally:
        await backend_for(client).close()


async def test_access_check_passes_with_the_rights_in_deploy_and_leaves_nothing(server: RedisServer) -> None:
    """The rules of deploy/redis/users.acl are enough for it."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "whole", "reset", *_rules("whole"))
        await _check(server, "whole", "whole")
        assert [key for key in client.scan_iter("*whole*") if b"check" in key] == []


@pytest.mark.parametrize("redis_program", ["redis", "valkey"], indirect=True)
def test_replica_on_a_cluster_passes_the_access_check(redis_program: str, tmp_path: Path) -> None:
    """Whatever slots its keys have: it joins the shared queue and caches, and nothing is refused."""
    with (
        redis_cluster(tmp_path, program=redis_program) as cluster,
        model_stub("--rate", "0", "--latency", "1ms", "--log", str(tmp_path / "log")) as stub,
    ):
        for number in range(3):
            flags = ("--model-target", stub.target, "--cache-url", cluster.url, "--key-prefix", f"p{number}")
            with cache_proxy(*flags, *UNPACED) as proxy:
                assert _readyz(proxy) == 200
                _answered(proxy, "cluster", 200)
                assert read_metrics(proxy.http_url)["cache_proxy_degraded",] == 0
                assert proxy.stop() == 0
                assert "WARNING" not in proxy.log


@pytest.mark.parametrize("right", [right for right in RIGHTS if right not in NOT_FOR_SERVE])
async def test_access_check_names_each_right_that_is_missing(right: str, server: RedisServer) -> None:
    """Whatever `serve` needs of deploy/redis/users.acl is missed before the replica takes part."""
    with server.client() as client:
        rules = [rule for rule in _rules("lacking") if rule != f"+{right}"]
        client.execute_command("ACL", "SETUSER", "lacking", "reset", *rules)
    with pytest.raises(StoreAccessDeniedError) as refused:
        await _check(server, "lacking", "lacking")
    assert refused.value.user == "lacking"
    assert refused.value.command in {right.partition("|")[0], right, "eval", "evalsha"}


@pytest.mark.parametrize(
    "taken",
    ["~lacking:*", "~{lacking}:*", "&{lacking}:*", "+@all -pubsub", "+@all -@pubsub", "+@all -script"],
)
async def test_access_check_notices_missing_keys_channels_and_categories(
    taken: str, server: RedisServer
) -> None:
    """Key patterns, channel patterns, and rights given as categories less one."""
    if taken.startswith("+"):
        rules = [*[rule for rule in _rules("lacking") if not rule.startswith("+")], *taken.split()]
    else:
        rules = [rule for rule in _rules("lacking") if rule != taken]
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "lacking", "reset", *rules)
    if taken == "+@all -script":
        await _check(server, "lacking", "lacking")  # SCRIPT is not needed
        return
    with pytest.raises(StoreAccessDeniedError):
        await _check(server, "lacking", "lacking")


async def test_access_check_names_a_wrong_password(server: RedisServer) -> None:
    """A login that is refused is no outage."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "whole", "reset", *_rules("whole"))
    with pytest.raises(StoreAccessDeniedError):
        await _check(server, "whole", "whole", password=b"wrong")


def _readyz(proxy: ServiceProcess) -> int:
    try:
        with urlopen(f"{proxy.http_url}/readyz", timeout=10) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code


def _answered(proxy: ServiceProcess, name: str, count: int = 20) -> None:
    pairs = [(name, f"Nurse {number}") for number in range(count)]
    with open_caller(proxy.target) as asking:
        reply = asking.infer(pairs, timeout_seconds=20)
    assert reply.code is grpc.StatusCode.OK, reply.message
    assert reply.levels == [infer_level(*pair) for pair in pairs]


def _joined(proxy: ServiceProcess) -> None:
    wait_for(lambda: _readyz(proxy) == 200, description="it is ready once it has the right")
    wait_for(
        lambda: read_metrics(proxy.http_url)["cache_proxy_degraded",] == 0, description="it joined the queue"
    )


def _queue_id(running: Fleet) -> bytes:
    with running.redis.client() as client:
        [meta] = client.scan_iter(f"*{running.key_prefix}*:meta")
        found: bytes | None = client.hget(meta, "queue")
    assert found
    return found


LACKING = [
    ("+@all", "-pubsub"),
    ("+@all", "-publish"),
    ("+@all", "-unlink"),
    ("+@all", "-evalsha"),
    ("+@all", "-subscribe"),
    ("+@all", "-rpush"),
    ("+@all", "resetchannels"),
    ("+@all", "resetkeys"),
]


@pytest.mark.parametrize("redis_program", ["redis", "valkey"], indirect=True)
def test_replica_that_lacks_a_right_stops_nobody_and_is_not_ready_until_it_has_it(
    running: Fleet, tmp_path: Path
) -> None:
    """The healthy ones answer new pairs on the same queue; the other says once what it lacks, then joins."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    healthy = running.start_replicas(2, *UNPACED)
    _answered(healthy[0], "first")
    queue_id = _queue_id(running)
    login = ("--cache-username", "app", "--cache-password-file", str(password))
    with running.redis.client() as client, ExitStack() as stack:
        for number, rules in enumerate(LACKING):
            base = ("reset", "on", ">s3cret", "~*", "&*")
            client.execute_command("ACL", "SETUSER", "app", *base, *rules)
            third = running.start_replica(*UNPACED, *login)
            assert _readyz(third) == 503, rules
            for proxy in healthy:
                _answered(proxy, f"{number} {proxy.target}")
            assert _queue_id(running) == queue_id, rules
            errors = [line for line in third.log_lines if '"ERROR"' in line]
            assert len(errors) == 1, errors
            assert "'app'" in errors[0]
            assert re.search(r"command '[a-z|]+'", errors[0]), errors
            if number % 4 == 0:
                client.execute_command("ACL", "SETUSER", "app", *base, "+@all")
                _joined(third)
                _answered(third, f"{number} third")
            assert third.stop() == 0
            assert "Traceback" not in third.log
        stack.close()


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
def test_replica_that_loses_a_right_while_it_runs_stays_ready_and_stops_nobody(
    running: Fleet, tmp_path: Path
) -> None:
    """It answers its callers from a queue of its own, and returns once it has the right again."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    base = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
    with running.redis.client() as client:
        client.execute_command("ACL", "SETUSER", "app", *base)
        healthy = running.start_replicas(2, *UNPACED)
        third = running.start_replica(
            *UNPACED, "--cache-username", "app", "--cache-password-file", str(password)
        )
        _answered(third, "third")
        queue_id = _queue_id(running)
        client.execute_command("ACL", "SETUSER", "app", "-publish")
        for turn in range(3):
            for proxy in (*healthy, third):
                _answered(proxy, f"{turn} {proxy.target}")
        assert _readyz(third) == 200
        assert _queue_id(running) == queue_id
        client.execute_command("ACL", "SETUSER", "app", *base)
        wait_for(
            lambda: read_metrics(third.http_url)["cache_proxy_degraded",] == 0, description="it returned"
        )
        _answered(third, "after")


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
def test_replica_checks_its_rights_when_redis_is_first_reached_after_its_start(
    running: Fleet, tmp_path: Path
) -> None:
    """It is ready, for Redis was away. It joins the queue once it has all rights; then its limits count."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    wire = running.open_link()
    wire.drop_traffic()
    late = running.start_replica(
        "--model-calls-per-second",
        "0",
        "--model-rate",
        "54321",
        "--linger",
        "1ms",
        "--cache-username",
        "app",
        "--cache-password-file",
        str(password),
        link=wire,
    )
    assert _readyz(late) == 200
    with running.redis.client() as client:
        base = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
        client.execute_command("ACL", "SETUSER", "app", *base, "-lpush")  # which no heartbeat uses
        wire.restore()
        wait_for(lambda: "command 'lpush'" in late.log, description="it says what it lacks")
        assert read_metrics(late.http_url)["cache_proxy_degraded",] == 1
        assert _readyz(late) == 200
        assert client.hget(f"{{{running.key_prefix}}}:limit", "pairs_per_second") is None
        client.execute_command("ACL", "SETUSER", "app", *base)
        wait_for(lambda: read_metrics(late.http_url)["cache_proxy_degraded",] == 0, description="it joined")
        assert client.hget(f"{{{running.key_prefix}}}:limit", "pairs_per_second")
    _answered(late, "late")


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
def test_replica_that_returns_leaves_the_limits_of_one_that_started_later(
    running: Fleet, tmp_path: Path
) -> None:
    """The newest start's limits count, whatever right an older replica lost and was given back."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    base = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
    limit = f"{{{running.key_prefix}}}:limit"
    with running.redis.client() as client:
        client.execute_command("ACL", "SETUSER", "app", *base)
        old = running.start_replica(
            "--model-rate", "500", "--cache-username", "app", "--cache-password-file", str(password)
        )
        running.start_replica("--model-rate", "900")
        newest = client.hget(limit, "pairs_per_second")
        for right in ("-zadd", "-evalsha"):
            client.execute_command("ACL", "SETUSER", "app", right)
            wait_for(
                lambda: read_metrics(old.http_url)["cache_proxy_degraded",] == 1,
                description="it left the queue",
            )
            client.execute_command("ACL", "SETUSER", "app", *base)
            wait_for(
                lambda: read_metrics(old.http_url)["cache_proxy_degraded",] == 0, description="it returned"
            )
        assert client.hget(limit, "pairs_per_second") == newest


def test_redis_client_error_texts_are_known() -> None:
    """What Redis 6.2 says in a script, where no server of that release is installed."""
    for text in (
        "ERR Error running script: @user_script: 1: The user executing the script can't run this command",
        "NOPERM this user has no permissions to run the 'publish' command or its subcommand",
        "ERR Error running script (call to f_1): @user_script: 1: Unknown Redis command called from Lua",
    ):
        assert is_access_denied(text)
        assert is_access_denied(redis.ResponseError(text))
    assert not is_access_denied("WRONGTYPE Operation against a key holding the wrong kind of value")


def test_access_check_tries_every_command_that_scripts_use() -> None:
    """A command that is added to a script is added to the check."""
    texts = {path.name: path.read_text() for path in (ROOT / "services/cache_proxy").rglob("*.lua")}
    tried = set(re.findall(r"try\('([A-Z]+)'", texts.pop("check_access.lua")))
    used = {name for text in texts.values() for name in re.findall(r"'([A-Z]{3,})'", text)}
    used -= {"WITHSCORES", "LIMIT", "NUMSUB", "ENCODING", "USAGE", "OBJECT", "MEMORY", "WRONGTYPE", "SAMPLES"}
    by_replicas = {"LRANGE", "LTRIM", "RPUSH", "HSETNX", "HKEYS"}
    assert tried == used | by_replicas


def _contents(client: "redis.Redis", prefix: str) -> dict[bytes, object]:
    return {key: client.dump(key) for key in client.scan_iter(f"*{prefix}*")}


@pytest.mark.parametrize("right", sorted({"resetkeys", "resetchannels", *QUEUE_RIGHTS}))
async def test_script_that_is_refused_a_right_changes_nothing(right: str, server: RedisServer) -> None:
    """Half a script's work, as a pair that has a record and is in no lane, would let others wait for good."""
    place = QueueLocation.create(server.url.replace("//", "//app:s3cret@"))
    prefix = place.keys.limit.strip("{}").partition("}")[0]
    everything = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
    unavailable = ModelUnavailableError("the model is away", retry_after_seconds=1)
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "app", *everything)
        async with replicas(place, 2) as (replica, other):
            await replica.enqueue(numbered_pairs(range(8)))
            claim = await replica.claim_batch()
            await other.enqueue(numbered_pairs(range(2, 12)))
            steps = (
                lambda: replica.enqueue(numbered_pairs(range(20, 24))),
                lambda: replica.enqueue(numbered_pairs(range(6))),
                replica.queue.claim,
                lambda: replica.queue.complete(claim, {one.digest: 3 for one in claim.pairs}),
                lambda: replica.queue.fail(claim, unavailable, model_fault=True),
                lambda: replica.queue.release(claim),
                lambda: replica.queue.cancel([one.digest for one in numbered_pairs(range(8))]),
                replica.session._heartbeat,
            )
            refused = 0
            for step in steps:
                client.execute_command("ACL", "SETUSER", "app", right)
                before = _contents(client, prefix)
                try:
                    await step()
                except StoreError:
                    assert _contents(client, prefix) == before
                    refused += 1
                client.execute_command("ACL", "SETUSER", "app", *everything)
            assert refused
