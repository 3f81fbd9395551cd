"""Redis with TLS: certificate authorities, client certificates and their reload, several servers."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.certificates import CertificateAuthority, MountedSecret, make_self_signed
from tests.support.model_server import scripted_model
from tests.support.processes import ROOT, ServiceProcess, cache_proxy
from tests.support.redis_cluster import redis_cluster
from tests.support.redis_sentinel import single_sentinel
from tests.support.redis_server import RedisServer, free_port, redis_process, wait_for

_DEPLOY = ROOT / "deploy/redis"


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
