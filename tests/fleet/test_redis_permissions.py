"""Replicas to which Redis denies a permission, a login or a command, beside replicas that have them all.

The module is longer than 250 lines, since unit-like checks of the permissions share its server and rules.
"""

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
_ONLY_FOR_STATS = {"memory|usage", "object|encoding"}
_ONLY_FOR_CLUSTER = {"cluster|slots", "cluster|shards", "command", "asking"}
# They depend on the URL (a database in it) and on the version of the protocol.
_ONLY_FOR_SOME_CONNECTIONS = {"select", "auth", "client|setname"}
# Redis permits `hello` to each user.
_NOT_REQUIRED = {"expire", "unsubscribe", "ping", "hello"}
NOT_FOR_SERVE = _ONLY_FOR_STATS | _ONLY_FOR_CLUSTER | _ONLY_FOR_SOME_CONNECTIONS | _NOT_REQUIRED
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
    """Run a server of each kind for many tests."""
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
    node = QueueNode(client, key=keys.limit, user=user)
    check = AccessCheck(
        node=node,
        key_prefixes=[keys.limit, keys.base, f"{prefix}:c2:n:{{00}}"],
        channel=keys.channel(0),
        user=user,
    )
    try:
        await check.run()
    finally:
        await backend_for(client).close()


async def test_access_check_passes_with_the_rights_in_deploy_and_leaves_nothing(server: RedisServer) -> None:
    """The rules of deploy/redis/users.acl suffice, and the check removes its keys."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "whole", "reset", *_rules("whole"))
        await _check(server, "whole", "whole")
        assert [key for key in client.scan_iter("*whole*") if b"check" in key] == []


@pytest.mark.parametrize("redis_program", ["redis", "valkey"], indirect=True)
def test_replica_on_a_cluster_passes_the_access_check(redis_program: str, tmp_path: Path) -> None:
    """Whatever slots its keys have, the replica joins the shared queue and caches, and nothing is denied."""
    with (
        redis_cluster(tmp_path, program=redis_program) as cluster,
        model_stub("--rate", "0", "--latency", "1ms", "--log", str(tmp_path / "log")) as stub,
    ):
        for number in range(3):
            flags = ("--model-target", stub.target, "--cache-url", cluster.url, "--key-prefix", f"p{number}")
            with cache_proxy(*flags, *UNPACED) as proxy:
                assert _readyz(proxy) == 200
                _assert_answered(proxy, "cluster", 200)
                assert read_metrics(proxy.http_url)["cache_proxy_degraded",] == 0
                assert proxy.stop() == 0
                assert "WARNING" not in proxy.log


@pytest.mark.parametrize("right", [right for right in RIGHTS if right not in NOT_FOR_SERVE])
async def test_access_check_names_each_right_that_is_missing(right: str, server: RedisServer) -> None:
    """The check detects each missing permission that `serve` needs of deploy/redis/users.acl."""
    with server.client() as client:
        rules = [rule for rule in _rules("lacking") if rule != f"+{right}"]
        client.execute_command("ACL", "SETUSER", "lacking", "reset", *rules)
    with pytest.raises(StoreAccessDeniedError) as denied:
        await _check(server, "lacking", "lacking")
    assert denied.value.user == "lacking"
    assert denied.value.command in {right.partition("|")[0], right, "eval", "evalsha"}


@pytest.mark.parametrize(
    "taken",
    ["~lacking:*", "~{lacking}:*", "&{lacking}:*", "+@all -pubsub", "+@all -@pubsub", "+@all -script"],
)
async def test_access_check_notices_missing_keys_channels_and_categories(
    taken: str, server: RedisServer
) -> None:
    """It covers key patterns, channel patterns, and permissions given as categories without one command."""
    if taken.startswith("+"):
        rules = [*[rule for rule in _rules("lacking") if not rule.startswith("+")], *taken.split()]
    else:
        rules = [rule for rule in _rules("lacking") if rule != taken]
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "lacking", "reset", *rules)
    if taken == "+@all -script":
        # SCRIPT is not needed.
        await _check(server, "lacking", "lacking")
        return
    with pytest.raises(StoreAccessDeniedError):
        await _check(server, "lacking", "lacking")


async def test_access_check_names_a_wrong_password(server: RedisServer) -> None:
    """A rejected login raises the error for denied access, not that for an outage."""
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


def _assert_answered(proxy: ServiceProcess, name: str, count: int = 20) -> None:
    pairs = [(name, f"Nurse {number}") for number in range(count)]
    with open_caller(proxy.target) as caller:
        reply = caller.infer(pairs, timeout_seconds=20)
    assert reply.code is grpc.StatusCode.OK, reply.message
    assert reply.levels == [infer_level(*pair) for pair in pairs]


def _wait_until_joined(proxy: ServiceProcess) -> None:
    wait_for(lambda: _readyz(proxy) == 200, description="it is ready once it has the right")
    wait_for(
        lambda: read_metrics(proxy.http_url)["cache_proxy_degraded",] == 0, description="it joined the queue"
    )


def _queue_id(fleet: Fleet) -> bytes:
    with fleet.redis.client() as client:
        [meta] = client.scan_iter(f"*{fleet.key_prefix}*:meta")
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
def test_replica_without_a_permission_is_not_ready_and_harms_no_other(fleet: Fleet, tmp_path: Path) -> None:
    """The others serve new pairs from the same queue. The replica logs once what it lacks and joins later."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    healthy = fleet.start_replicas(2, *UNPACED)
    _assert_answered(healthy[0], "first")
    queue_id = _queue_id(fleet)
    login = ("--cache-username", "app", "--cache-password-file", str(password))
    with fleet.redis.client() as client, ExitStack() as stack:
        for number, rules in enumerate(LACKING):
            base = ("reset", "on", ">s3cret", "~*", "&*")
            client.execute_command("ACL", "SETUSER", "app", *base, *rules)
            third = fleet.start_replica(*UNPACED, *login)
            assert _readyz(third) == 503, rules
            for proxy in healthy:
                _assert_answered(proxy, f"{number} {proxy.target}")
            assert _queue_id(fleet) == queue_id, rules
            errors = [line for line in third.log_lines if '"ERROR"' in line]
            assert len(errors) == 1, errors
            assert "'app'" in errors[0]
            assert re.search(r"command '[a-z|]+'", errors[0]), errors
            if number % 4 == 0:
                client.execute_command("ACL", "SETUSER", "app", *base, "+@all")
                _wait_until_joined(third)
                _assert_answered(third, f"{number} third")
            assert third.stop() == 0
            assert "Traceback" not in third.log
        stack.close()


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
def test_replica_that_loses_a_permission_stays_ready_and_harms_no_other(fleet: Fleet, tmp_path: Path) -> None:
    """It serves its callers from its local queue and returns once it has the permission again."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    base = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
    with fleet.redis.client() as client:
        client.execute_command("ACL", "SETUSER", "app", *base)
        healthy = fleet.start_replicas(2, *UNPACED)
        third = fleet.start_replica(
            *UNPACED, "--cache-username", "app", "--cache-password-file", str(password)
        )
        _assert_answered(third, "third")
        queue_id = _queue_id(fleet)
        client.execute_command("ACL", "SETUSER", "app", "-publish")
        for turn in range(3):
            for proxy in (*healthy, third):
                _assert_answered(proxy, f"{turn} {proxy.target}")
        assert _readyz(third) == 200
        assert _queue_id(fleet) == queue_id
        client.execute_command("ACL", "SETUSER", "app", *base)
        wait_for(
            lambda: read_metrics(third.http_url)["cache_proxy_degraded",] == 0, description="it returned"
        )
        _assert_answered(third, "after")


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
def test_replica_checks_permissions_when_it_first_reaches_redis_after_start(
    fleet: Fleet, tmp_path: Path
) -> None:
    """It is ready, since Redis was down. It joins once it has all permissions, and then its limits apply."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    link = fleet.open_link()
    link.drop_traffic()
    late = fleet.start_replica(
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
        link=link,
    )
    assert _readyz(late) == 200
    with fleet.redis.client() as client:
        base = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
        # No heartbeat uses LPUSH.
        client.execute_command("ACL", "SETUSER", "app", *base, "-lpush")
        link.restore()
        wait_for(lambda: "command 'lpush'" in late.log, description="it logs what it lacks")
        assert read_metrics(late.http_url)["cache_proxy_degraded",] == 1
        assert _readyz(late) == 200
        assert client.hget(f"{{{fleet.key_prefix}}}:limit", "pairs_per_second") is None
        client.execute_command("ACL", "SETUSER", "app", *base)
        wait_for(lambda: read_metrics(late.http_url)["cache_proxy_degraded",] == 0, description="it joined")
        assert client.hget(f"{{{fleet.key_prefix}}}:limit", "pairs_per_second")
    _assert_answered(late, "late")


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
def test_returning_replica_keeps_the_limits_of_a_later_start(fleet: Fleet, tmp_path: Path) -> None:
    """The limits of the last start apply, whatever permission an older replica lost and got back."""
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("s3cret")
    base = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
    limit = f"{{{fleet.key_prefix}}}:limit"
    with fleet.redis.client() as client:
        client.execute_command("ACL", "SETUSER", "app", *base)
        old = fleet.start_replica(
            "--model-rate", "500", "--cache-username", "app", "--cache-password-file", str(password)
        )
        fleet.start_replica("--model-rate", "900")
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
    """The error texts of Redis 6.2 in a script are recognized. No server of that release is installed."""
    for text in (
        "ERR Error fleet script: @user_script: 1: The user executing the script can't run this command",
        "NOPERM this user has no permissions to run the 'publish' command or its subcommand",
        "ERR Error fleet script (call to f_1): @user_script: 1: Unknown Redis command called from Lua",
    ):
        assert is_access_denied(text)
        assert is_access_denied(redis.ResponseError(text))
    assert not is_access_denied("WRONGTYPE Operation against a key holding the wrong kind of value")


def test_access_check_tries_each_command_that_scripts_use() -> None:
    """A command that is added to a script must be added to the check."""
    texts = {path.name: path.read_text() for path in (ROOT / "services/cache_proxy").rglob("*.lua")}
    tried = set(re.findall(r"try\('([A-Z]+)'", texts.pop("check_access.lua")))
    used = {name for text in texts.values() for name in re.findall(r"'([A-Z]{3,})'", text)}
    used -= {"WITHSCORES", "LIMIT", "NUMSUB", "ENCODING", "USAGE", "OBJECT", "MEMORY", "WRONGTYPE", "SAMPLES"}
    by_replicas = {"LRANGE", "LTRIM", "RPUSH", "HSETNX", "HKEYS"}
    assert tried == used | by_replicas


def _contents(client: "redis.Redis", prefix: str) -> dict[bytes, object]:
    return {key: client.dump(key) for key in client.scan_iter(f"*{prefix}*")}


@pytest.mark.parametrize("right", sorted({"resetkeys", "resetchannels", *QUEUE_RIGHTS}))
async def test_script_without_a_permission_changes_nothing(right: str, server: RedisServer) -> None:
    """A script must not fail halfway: a pair with a record that is not queued would wait forever."""
    location = QueueLocation.create(server.url.replace("//", "//app:s3cret@"))
    prefix = location.keys.limit.strip("{}").partition("}")[0]
    everything = ("reset", "on", ">s3cret", "~*", "&*", "+@all")
    unavailable = ModelUnavailableError("the model is away", retry_after_seconds=1)
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "app", *everything)
        async with replicas(location, 2) as (replica, other):
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
            denied_steps = 0
            for step in steps:
                client.execute_command("ACL", "SETUSER", "app", right)
                before = _contents(client, prefix)
                try:
                    await step()
                except StoreError:
                    assert _contents(client, prefix) == before
                    denied_steps += 1
                client.execute_command("ACL", "SETUSER", "app", *everything)
            assert denied_steps
