"""The password of Redis and of Sentinels is changed while a proxy runs."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import scripted_model
from tests.support.processes import ServiceProcess, cache_proxy, run_command
from tests.support.redis_cluster import redis_cluster, single_sentinel
from tests.support.redis_server import redis_process, wait_for

pytestmark = pytest.mark.slow

_ADMIN = "administrator"


@dataclass(frozen=True)
class _Servers:
    """Servers with the user `app`, whose password they share, and how a proxy finds them."""

    url: str
    ports: Sequence[int]
    sentinel_ports: Sequence[int] = ()

    def set_password(self, password: str) -> None:
        """Change it everywhere and close the connections of the user."""
        for port in (*self.ports, *self.sentinel_ports):
            rights = ("+@all",) if port in self.sentinel_ports else ("~*", "&*", "+@all")
            with redis.Redis(port=port, username=_ADMIN, password=_ADMIN) as client:
                client.execute_command("ACL", "SETUSER", "app", "reset", "on", f">{password}", *rights)
                client.execute_command("CLIENT", "KILL", "USER", "app")


@pytest.fixture(params=["one", "cluster", "sentinel"])
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[_Servers]:
    """Servers with that user; a Sentinel lets in nobody else."""
    with ExitStack() as stack:
        if request.param == "cluster":
            # A new Cluster of Valkey 9.1 refuses scripts on a third of the slots, with or without a password:
            # "Attempted to access a non local key". That is another fault than those of this test.
            program = shutil.which("redis-server")
            if program is None:
                pytest.skip("no redis-server is installed")
            cluster = stack.enter_context(redis_cluster(tmp_path, program=program))
            servers = _Servers(cluster.url, [node.port for node in cluster.nodes])
        else:
            server = stack.enter_context(redis_process(tmp_path))
            servers = _Servers(server.url, [server.port])
        if request.param == "sentinel":
            (tmp_path / "replica").mkdir()
            replica = redis_process(tmp_path / "replica", "--replicaof", f"127.0.0.1 {servers.ports[0]}")
            stack.enter_context(replica)
            port = stack.enter_context(
                single_sentinel(tmp_path, master_port=servers.ports[0], master_name="cache")
            )
            servers = _Servers(f"redis+sentinel://127.0.0.1:{port}/cache", servers.ports, [port])
        for port in (*servers.ports, *servers.sentinel_ports):
            with redis.Redis(port=port) as client:
                client.execute_command("ACL", "SETUSER", _ADMIN, "on", f">{_ADMIN}", "~*", "&*", "+@all")
        servers.set_password("first")
        for port in servers.sentinel_ports:
            with redis.Redis(port=port, username=_ADMIN, password=_ADMIN) as client:
                client.execute_command("ACL", "SETUSER", "default", "off")
                client.execute_command("CLIENT", "KILL", "USER", "default")
        yield servers


def _write(path: Path, text: str) -> None:
    """Replace it at once, as Kubernetes and the recipe in docs/operations.md do."""
    fresh = path.with_suffix(".new")
    fresh.touch(0o600)
    fresh.write_text(text)
    fresh.rename(path)


def _flags(servers: _Servers, path: Path) -> tuple[str, ...]:
    flags: tuple[str, ...] = (
        "--cache-url",
        servers.url,
        "--cache-username",
        "app",
        "--cache-password-file",
        str(path),
    )
    if servers.sentinel_ports:
        flags += ("--sentinel-username", "app", "--sentinel-password-file", str(path))
    return flags


def _is_degraded(proxy: ServiceProcess) -> bool:
    return read_metrics(proxy.http_url)["cache_proxy_degraded",] == 1


def test_password_that_changes_is_followed_without_a_restart(guarded: _Servers, tmp_path: Path) -> None:
    """The file first, then the server first; a file that is empty leaves the last password in use."""
    path = tmp_path / "password"
    _write(path, "first\n")
    flags = _flags(guarded, path)
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target", model.target, "--l1-max-bytes", "0", *flags, *UNLIMITED_RATE_FLAGS
        ) as proxy,
        open_caller(proxy.target) as asking,
    ):
        pairs = make_pairs("password", 50)

        def is_served_by_redis() -> bool:
            return not _is_degraded(proxy) and asking.infer(pairs).hits == len(pairs)

        def renewals(outcome: str) -> float:
            files = ["cache_password", *(["sentinel_password"] if guarded.sentinel_ports else [])]
            shown = read_metrics(proxy.http_url)
            return min(shown["cache_proxy_renewals_total", one, outcome] for one in files)

        assert asking.infer(pairs).misses == len(pairs)
        wait_for(is_served_by_redis, description="the pairs are cached")

        _write(path, "second\n")
        wait_for(lambda: renewals("done") == 1, description="the new file is noticed")
        guarded.set_password("second")
        wait_for(
            is_served_by_redis, description="the proxy is back with the password that the file had before"
        )

        guarded.set_password("third")
        wait_for(lambda: _is_degraded(proxy), description="the old password is refused")
        assert asking.infer([("while refused", "t")]).misses == 1
        _write(path, "third\n")
        wait_for(is_served_by_redis, description="the proxy is back with the new password")
        assert renewals("done") == 2

        _write(path, "")
        wait_for(lambda: renewals("failed") == 1, description="the empty file is noticed")
        guarded.set_password("third")
        wait_for(is_served_by_redis, description="the proxy is back with the last password")

        _write(path, "third\n")
        ended = run_command("services.cache_proxy", "stats", *flags)
        assert ended.returncode == 0, ended.stderr
        assert proxy.stop() == 0
        assert not [word for word in ("first", "second", "third") if word in proxy.log]
        assert "Traceback" not in proxy.log
