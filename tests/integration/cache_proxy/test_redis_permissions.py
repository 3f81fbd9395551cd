"""The permissions, logins and certificates that the proxy needs in a protected Redis."""

import asyncio
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
import redis

from services.cache_proxy.cache.invalidation import InvalidationFollower, InvalidationLog
from services.cache_proxy.redis_client.client_factory import RedisCredentials, backend_for, create_client
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.certificates import CertificateAuthority, MountedSecret, make_self_signed
from tests.support.model_server import scripted_model
from tests.support.processes import ROOT, ServiceProcess, cache_proxy, run_command
from tests.support.redis_cluster import redis_cluster, single_sentinel
from tests.support.redis_server import RedisServer, free_port, local_server_program, redis_process, wait_for

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


@pytest.mark.slow
def test_redis_with_tls_is_reached_only_with_its_ca(tmp_path: Path) -> None:
    """With another CA, the store is unavailable and callers are answered without it."""
    program = shutil.which("redis-server")
    if program is None or shutil.which("openssl") is None:
        pytest.skip("no redis-server (with TLS) and openssl are installed")
    tls_port = free_port()
    certificate, key = make_self_signed(tmp_path, "good")
    other, _ = make_self_signed(tmp_path, "other")
    with (
        redis_process(
            tmp_path,
            "--tls-port",
            str(tls_port),
            "--tls-cert-file",
            str(certificate),
            "--tls-key-file",
            str(key),
            "--tls-auth-clients",
            "no",
            program=program,
        ),
        scripted_model() as model,
    ):
        flags = (
            "--model-target",
            model.target,
            "--cache-url",
            f"rediss://127.0.0.1:{tls_port}",
            *UNLIMITED_RATE_FLAGS,
        )
        for ca, hits in ((certificate, 0), (certificate, 5), (other, 0)):
            with cache_proxy(*flags, "--cache-tls-ca", str(ca)) as proxy, open_caller(proxy.target) as caller:
                assert caller.infer(make_pairs("tls", 5)).hits == hits
                assert read_metrics(proxy.http_url)["cache_proxy_store_up",] == (ca is certificate)
                proxy.stop()


@pytest.mark.slow
def test_client_certificate_for_redis_is_sent_and_reloaded(tmp_path: Path) -> None:
    """Caller, proxy, model and Redis use mutual TLS; with an unknown certificate, nothing is cached.

    When Redis comes back with certificates of another CA, the proxy uses the new files without a restart.
    """
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server (with TLS) is installed")
    first = CertificateAuthority(tmp_path, "first")
    second = CertificateAuthority(tmp_path, "second")
    server = MountedSecret(tmp_path / "server")
    client = MountedSecret(tmp_path / "client")
    server.replace_certificate(first.sign("redis"))
    client.replace_certificate(first.sign("proxy"))
    server_files = server.paths
    client_files = client.paths
    port = free_port()
    static = first.sign("static")
    ca, key, certificate = static.pem
    with (
        redis_process(
            tmp_path,
            "--tls-port",
            str(port),
            "--tls-cert-file",
            str(server_files.certificate),
            "--tls-key-file",
            str(server_files.key),
            "--tls-ca-cert-file",
            str(server_files.ca),
            "--tls-auth-clients",
            "yes",
            program=program,
        ) as redis_server,
        scripted_model(
            credentials=grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
        ) as model,
    ):

        def is_degraded(proxy: ServiceProcess) -> float:
            return read_metrics(proxy.http_url)["cache_proxy_degraded",]

        url = f"rediss://127.0.0.1:{port}?ssl_certfile={{}}&ssl_keyfile={{}}"
        flags = (
            "--model-target",
            model.target,
            *static.flags("--model-tls"),
            *static.flags(ca="client-ca"),
            "--cache-tls-ca",
            str(client_files.ca),
            *UNLIMITED_RATE_FLAGS,
            "--cache-url",
        )
        caller_credentials = grpc.ssl_channel_credentials(*static.pem)
        with (
            cache_proxy(
                *flags, url.format(client_files.certificate, client_files.key), "--l1-max-bytes", "0"
            ) as proxy,
            open_caller(proxy.target, caller_credentials) as caller,
        ):
            pairs = make_pairs("mutual", 5)
            assert caller.infer(pairs).misses == 5
            wait_for(lambda: caller.infer(pairs).hits == 5, description="the pairs are cached")
            redis_server.kill()
            wait_for(lambda: is_degraded(proxy) == 1, description="Redis is lost")
            server.replace_certificate(second.sign("redis"))
            client.replace_certificate(second.sign("proxy"))
            redis_server.start()
            wait_for(
                lambda: caller.infer(pairs).hits and is_degraded(proxy) == 0,
                description="Redis is reached again",
            )
            assert read_metrics(proxy.http_url)["cache_proxy_renewals_total", "cache_tls", "done"] == 1
            proxy.stop()
        unknown_certificate, _ = make_self_signed(tmp_path, "unknown")
        with (
            cache_proxy(*flags, url.format(unknown_certificate, tmp_path / "unknown.key")) as proxy,
            open_caller(proxy.target, caller_credentials) as caller,
        ):
            assert caller.infer(pairs).misses == 5
            assert read_metrics(proxy.http_url)["cache_proxy_store_up",] == 0


@dataclass(frozen=True)
class _ProtectedServers:
    """Servers that require TLS or a login, and the flags with which a proxy is accepted."""

    url: str
    flags: tuple[str, ...]
    nodes: Sequence[RedisServer]


@pytest.fixture(params=["cluster", "sentinel"])
def protected_servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_ProtectedServers]:
    """Yield several servers behind one URL with mutual TLS; the tests use their ports without TLS."""
    program = shutil.which("redis-server")
    if program is None or shutil.which("openssl") is None:
        pytest.skip("no redis-server (with TLS) and openssl are installed")
    users = tmp_path / "users.acl"
    password = tmp_path / "password"
    permissions = (_DEPLOY / "users.acl").read_text().replace("CHANGE-ME", "s3cret")
    users.write_text(permissions.replace("user default off", "user default on nopass ~* &* +@all"))
    password.touch(0o600)
    password.write_text("s3cret\n")
    certificate, key = make_self_signed(tmp_path, "good")
    with ExitStack() as stack:
        tls = {
            "tls-cert-file": str(certificate),
            "tls-key-file": str(key),
            "tls-ca-cert-file": str(certificate),
            "tls-auth-clients": "yes",
            "tls-replication": "yes",
        }
        settings = [part for name, value in tls.items() for part in (f"--{name}", value)]
        settings += ["--aclfile", str(users)]
        if request.param == "cluster":
            cluster = stack.enter_context(redis_cluster(tmp_path, *settings, program=program, tls=True))
            url = "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in cluster.tls_ports[:2])
            nodes = cluster.nodes
        else:
            url, nodes = _start_sentinel_service(stack, tmp_path, settings, tls, program)
        flags = (
            "--cache-username",
            "seniority",
            "--cache-password-file",
            str(password),
            "--cache-tls-ca",
            str(certificate),
        )
        url += f"?ssl_certfile={certificate}&ssl_keyfile={key}"
        yield _ProtectedServers(url, flags, nodes)


def _start_sentinel_service(
    stack: ExitStack, folder: Path, settings: Sequence[str], tls: Mapping[str, str], program: str
) -> tuple[str, Sequence[RedisServer]]:
    ports = [str(free_port()) for _ in range(3)]
    nodes: list[RedisServer] = []
    for name, port in zip(("master", "replica"), ports, strict=False):
        (folder / name).mkdir()
        follow = ("--replicaof", f"127.0.0.1 {ports[0]}") if nodes else ()
        server = redis_process(folder / name, "--tls-port", port, *settings, *follow, program=program)
        nodes.append(stack.enter_context(server))
    lines = [f"{name} {value}" for name, value in tls.items()]
    stack.enter_context(
        single_sentinel(
            folder, f"tls-port {ports[2]}", *lines, master_port=int(ports[0]), master_name="cache"
        )
    )
    return f"redis+sentinel://127.0.0.1:{ports[2]}/cache", nodes


@pytest.mark.slow
def test_several_servers_are_reached_with_tls_and_minimal_permissions(
    protected_servers: _ProtectedServers,
) -> None:
    """Two proxies on a Cluster or behind Sentinels share one queue, and no permission is missing."""
    url = protected_servers.url
    flags = protected_servers.flags
    nodes = protected_servers.nodes
    with (
        scripted_model() as model,
        cache_proxy("--model-target", model.target, "--cache-url", url, *flags, *UNLIMITED_RATE_FLAGS) as one,
        cache_proxy(
            "--model-target", model.target, "--cache-url", url, *flags, *UNLIMITED_RATE_FLAGS
        ) as other,
        open_caller(one.target) as caller,
        open_caller(other.target) as other_caller,
    ):
        for proxy in (one, other):
            wait_for(
                lambda: read_metrics(proxy.http_url)["cache_proxy_live_replicas",] == 2,  # noqa: B023
                description="both replicas are known",
            )
        pairs = make_pairs("guarded", 500)
        assert caller.infer(pairs).misses == 500
        wait_for(lambda: other_caller.infer(pairs).misses == 0, description="the pairs are cached")
        for proxy in (one, other):
            assert read_metrics(proxy.http_url)["cache_proxy_degraded",] == 0
            assert "WARNING" not in proxy.log
            assert proxy.stop() == 0
        assert sum(len(call.pairs) for call in model.calls) == 500
    for node in nodes:
        with node.client() as client:
            assert client.acl_log() == []


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
