"""The permissions and logins that the proxy needs in a protected Redis."""

import asyncio
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import redis

from services.cache_proxy.cache.invalidation import InvalidationFollower, InvalidationLog
from services.cache_proxy.redis_client.client_factory import RedisCredentials, backend_for, create_client
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import scripted_model
from tests.support.processes import ROOT, cache_proxy, run_command
from tests.support.redis_sentinel import single_sentinel
from tests.support.redis_server import RedisServer, local_server_program, redis_process, wait_for

_DEPLOY = ROOT / "deploy/redis"
# Needed by a Cluster, a database in the URL, or an older protocol.
_UNUSED_HERE = {"command", "cluster|slots", "cluster|shards", "asking", "select", "auth", "client|setname"}
# Used in rare cases that this test does not reach.
_RARE = {
    "hsetnx",
    "hkeys",
    "hlen",
    "type",
    "del",
    "rpop",
    "lpush",
    "llen",
    "hexists",
    "hgetall",
}
_RARE |= {"zrange", "unsubscribe", "zcard", "zrem", "info", "pubsub|numsub"}


@pytest.fixture
def protected_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Yield a server with the users and settings of deploy/redis."""
    users = tmp_path / "users.acl"
    text = (_DEPLOY / "users.acl").read_text().replace("CHANGE-ME", "s3cret")
    users.write_text(text + "user tester on >tester ~* &* +@all\n")
    settings = [
        line.split(" ", 1)
        for line in (_DEPLOY / "redis.conf").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    arguments = [part for name, value in settings for part in (f"--{name}", value)]
    with _run_protected_server(tmp_path, *arguments, "--aclfile", str(users), user="tester") as server:
        yield server


@contextmanager
def _run_protected_server(folder: Path, *args: str, user: str) -> Iterator[RedisServer]:
    """Run a server as `redis_process` does, but with a login for the clients of the test."""
    server = RedisServer(local_server_program(), folder, args=args)
    server.client = lambda: redis.Redis(port=server.port, username=user, password=user)  # type: ignore[method-assign]
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.slow
@pytest.mark.alone
def test_deployed_permissions_are_sufficient_and_minimal(
    protected_redis: RedisServer, tmp_path: Path
) -> None:
    """The proxy and every command work with them, and each permission is used by one of them.

    Keys of other applications and dangerous commands are denied.
    """
    password = tmp_path / "password"
    path = tmp_path / "a.jsonl"
    password.touch(0o600)
    password.write_text("s3cret\n")
    path.write_text('{"company": "c", "title": "t", "seniority": 1}\n')
    flags = (
        "--cache-url",
        protected_redis.url,
        "--cache-username",
        "seniority",
        "--cache-password-file",
        str(password),
    )
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, *flags, *UNLIMITED_RATE_FLAGS) as proxy,
        open_caller(proxy.target) as caller,
    ):
        pairs = make_pairs("access", 2000)
        assert caller.infer(pairs).misses == 2000
        wait_for(
            lambda: read_metrics(proxy.http_url)["cache_proxy_live_replicas",] == 1,
            description="the replica is known",
        )
        assert read_metrics(proxy.http_url)["cache_proxy_degraded",] == 0
        for command in (
            ("stats",),
            ("get", "--company", "access 1", "--title", "Title 1"),
            ("invalidate", "--company", "access 1", "--title", "Title 1"),
            ("warm", str(path)),
            ("invalidate", "--all"),
        ):
            finished = run_command("services.cache_proxy", command[0], *flags, *command[1:])
            assert finished.returncode == 0, finished.stderr
        with urlopen(f"{proxy.http_url}/status.json", timeout=10) as page:
            assert page.status == 200
        assert proxy.stop() == 0
    asyncio.run(_read_invalidation_log(protected_redis.url))
    with protected_redis.client() as client:
        assert client.acl_log() == []
        used = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
        slow = client.slowlog_get(10)
    assert not [entry for entry in slow if b"EVALSHA" in entry["command"] and entry["duration"] > 50_000]
    granted = set(re.findall(r"\+([a-z|]+)", (_DEPLOY / "users.acl").read_text()))
    assert granted - used - _UNUSED_HERE - _RARE == set()
    with redis.Redis(port=protected_redis.port, username="seniority", password="s3cret") as client:
        for command_line in (
            "FLUSHALL",
            "KEYS *",
            "CONFIG GET *",
            "SHUTDOWN",
            "GET seniority:x",
            "HGET other x",
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command_line.split())


async def _read_invalidation_log(url: str) -> None:
    """Read the log of invalidations once, as a proxy with an embedded queue does."""
    access = RedisCredentials(username="seniority", password=b"s3cret")
    reached = backend_for(create_client(url, timeout_seconds=5, credentials=access))
    log = InvalidationLog(reached, "{seniority}:q1:fold1:1:log")
    await InvalidationFollower(log, remove=lambda _: None, clear=lambda: None).poll()
    await reached.close()


@dataclass(frozen=True)
class _ProtectedServers:
    """Servers that require TLS or a login, and the flags with which a proxy is accepted."""

    url: str
    flags: tuple[str, ...]
    nodes: Sequence[RedisServer]


@pytest.fixture(params=["password", "user"])
def protected_sentinel(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_ProtectedServers]:
    """Yield a Sentinel that requires the password of its default user or of a user with few permissions."""
    program = shutil.which("redis-sentinel")
    if program is None:
        pytest.skip("redis-sentinel is not installed")
    lines = ["requirepass s3cret"]
    flags = ["--sentinel-password-file", "password"]
    username = None
    if request.param == "user":
        username = "tester"
        lines = [
            "user default off",
            "user tester on >s3cret allchannels +@all",
            "user proxy on >pr0xy resetchannels -@all +hello +auth +sentinel|masters",
        ]
        flags += ["--sentinel-username", "proxy"]
    password = tmp_path / "password"
    password.touch(0o600)
    password.write_text("pr0xy\n" if username else "s3cret\n")
    flags[1] = str(password)
    with ExitStack() as stack:
        nodes: list[RedisServer] = []
        for name in ("master", "replica"):
            (tmp_path / name).mkdir()
            follow = ("--replicaof", f"127.0.0.1 {nodes[0].port}") if nodes else ()
            nodes.append(stack.enter_context(redis_process(tmp_path / name, *follow)))
        port = stack.enter_context(
            single_sentinel(
                tmp_path,
                *lines,
                master_port=nodes[0].port,
                master_name="cache",
                program=program,
                username=username,
                password="s3cret",
            )
        )
        yield _ProtectedServers(f"redis+sentinel://127.0.0.1:{port}/cache", tuple(flags), nodes)


@pytest.mark.slow
def test_sentinel_login_uses_its_separate_user_and_password(
    protected_sentinel: _ProtectedServers, tmp_path: Path
) -> None:
    """With a wrong password or none, store and queue log one line each that names the denied user."""
    url = protected_sentinel.url
    flags = protected_sentinel.flags
    wrong_password = tmp_path / "wrong"
    wrong_password.touch(0o600)
    wrong_password.write_text("something else\n")
    with scripted_model() as model:
        common = ("--model-target", model.target, "--cache-url", url, *UNLIMITED_RATE_FLAGS)
        with cache_proxy(*common, *flags) as proxy, open_caller(proxy.target) as caller:
            assert caller.infer(make_pairs("sentinel", 20)).misses == 20
            wait_for(
                lambda: read_metrics(proxy.http_url)["cache_proxy_live_replicas",] == 1,
                description="the replica is known",
            )
            assert read_metrics(proxy.http_url)["cache_proxy_degraded",] == 0
            assert "WARNING" not in proxy.log
            assert proxy.stop() == 0
        named = flags[-1] if "--sentinel-username" in flags else "default"
        for user, login_flags in (
            ("default", ()),
            (named, ("--sentinel-password-file", str(wrong_password), *flags[2:])),
        ):
            with cache_proxy(*common, *login_flags) as proxy, open_caller(proxy.target) as caller:
                assert len(caller.infer(make_pairs(f"denied {len(login_flags)}", 5)).levels) == 5
                wait_for(lambda: "the store is down" in proxy.log, description="the store is down")
                assert "this replica leaves the shared queue until that is mended" in proxy.log
                with pytest.raises(HTTPError):
                    urlopen(f"{proxy.http_url}/readyz", timeout=10)
                warnings = [line for line in proxy.log.splitlines() if '"INFO"' not in line]
                assert len(warnings) == 2, warnings
                for line in warnings:
                    assert f"a Sentinel refuses user '{user}' (see --sentinel-username" in line
                assert "Traceback" not in proxy.log
                assert proxy.stop() == 0
