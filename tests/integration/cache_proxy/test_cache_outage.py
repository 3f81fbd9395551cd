"""Outages of the cache for every kind of URL: the effect on misses, starts and stops.

One module of more than 250 lines: all tests use the same kinds of servers and of outages.
"""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import open_caller, read_metrics
from tests.support.model_server import scripted_model
from tests.support.processes import ServiceProcess, cache_proxy
from tests.support.redis_cluster import redis_cluster
from tests.support.redis_sentinel import sentinel_servers
from tests.support.redis_server import RedisServer, redis_process, wait_for
from tests.support.store_checks import infer_new_pairs

pytestmark = [pytest.mark.slow, pytest.mark.alone]

_SERVICE = "cache"
_MAX_MISS_SECONDS = 5.0
# One or two seconds, and the noise of a busy machine.
_MAX_STOP_SECONDS = 3.0
# A few --cache-timeout (250 ms), and the noise of two starts on a busy machine.
_MAX_START_DELAY_SECONDS = 3.0
_DOWN = "the store is down"
_UP = "the store is back"
_LOST = "the shared queue is lost"
_BACK = "the shared queue is back"


@dataclass
class _RedisServers:
    """All servers behind one URL."""

    url: str
    servers: Sequence[RedisServer]
    socket_path: Path | None = None
    _replacement_sockets: list[socket.socket] = field(default_factory=list)

    def kill(self) -> None:
        """Kill all servers: connections are refused."""
        for server in self.servers:
            server.kill()

    def freeze(self) -> None:
        """Pause all servers (SIGSTOP): connections are accepted and no command is answered."""
        for server in self.servers:
            server.pause()

    def black_hole(self) -> None:
        """Replace all servers by listeners with a full backlog: no connection is established."""
        self.kill()
        for server in self.servers:
            self._fill_backlog(socket.AF_INET, ("127.0.0.1", server.port))
        if self.socket_path:
            self.socket_path.unlink(missing_ok=True)
            self._fill_backlog(socket.AF_UNIX, str(self.socket_path))

    def recover(self) -> None:
        """End any of these outages."""
        self.close()
        if self.socket_path and not self.servers[0].is_running:
            self.socket_path.unlink(missing_ok=True)
        for server in self.servers:
            if server.is_running:
                server.resume()
        for server in self.servers:
            if not server.is_running:
                server.start()

    def _fill_backlog(self, family: int, address: tuple[str, int] | str) -> None:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(0)
        self._replacement_sockets.append(listener)
        # One connection more than fits would do; four make sure of it.
        for _ in range(4):
            client = socket.socket(family)
            client.setblocking(False)
            client.connect_ex(address)
            self._replacement_sockets.append(client)

    def close(self) -> None:
        """Close the sockets of `black_hole`."""
        while self._replacement_sockets:
            self._replacement_sockets.pop().close()


@contextmanager
def _single_server(folder: Path) -> Iterator[_RedisServers]:
    with redis_process(folder) as server:
        yield _RedisServers(server.url, [server])


@contextmanager
def _unix_socket(folder: Path) -> Iterator[_RedisServers]:
    path = folder / "redis.sock"
    with redis_process(folder, "--unixsocket", str(path)) as server:
        yield _RedisServers(f"unix://{path}", [server], path)


@contextmanager
def _cluster(folder: Path) -> Iterator[_RedisServers]:
    with redis_cluster(folder) as cluster:
        yield _RedisServers(cluster.url, cluster.nodes)


@contextmanager
def _sentinel_service(folder: Path) -> Iterator[_RedisServers]:
    with ExitStack() as stack:
        for name in ("master", "replica"):
            (folder / name).mkdir()
        master = stack.enter_context(redis_process(folder / "master"))
        replica_of = ("--replicaof", f"127.0.0.1 {master.port}")
        replica = stack.enter_context(redis_process(folder / "replica", *replica_of))
        sentinels = stack.enter_context(
            sentinel_servers(folder, master_port=master.port, master_name=_SERVICE)
        )
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        yield _RedisServers(f"redis+sentinel://{hosts}/{_SERVICE}", [*sentinels, master, replica])


_KINDS = {"redis": _single_server, "unix": _unix_socket, "cluster": _cluster, "sentinel": _sentinel_service}
_OUTAGES = {
    "refused": _RedisServers.kill,
    "frozen": _RedisServers.freeze,
    "black-holed": _RedisServers.black_hole,
}


@dataclass
class _StartedProxy:
    proxy: ServiceProcess
    start_seconds: float


@contextmanager
def _start_proxy(url: str, model: str) -> Iterator[_StartedProxy]:
    started_at = time.monotonic()
    flags = ("--cache-url", url, "--model-target", model, *UNLIMITED_RATE_FLAGS)
    with cache_proxy(*flags) as proxy:
        yield _StartedProxy(proxy, time.monotonic() - started_at)


def _miss_seconds(proxy: ServiceProcess, name: str) -> float:
    with open_caller(proxy.target) as caller:
        return infer_new_pairs(caller, name)


def _stop_seconds(proxy: ServiceProcess) -> float:
    started_at = time.monotonic()
    assert proxy.stop() == 0
    return time.monotonic() - started_at


def _warnings(proxy: ServiceProcess) -> list[str]:
    """Return the log lines above the level INFO."""
    return [line for line in proxy.log.splitlines() if '"INFO"' not in line]


@pytest.mark.parametrize("begin_outage", _OUTAGES.values(), ids=_OUTAGES)
@pytest.mark.parametrize("kind", _KINDS.values(), ids=_KINDS)
def test_outage_of_cache_delays_no_miss_start_or_stop(
    kind: Callable[[Path], AbstractContextManager[_RedisServers]],
    begin_outage: Callable[[_RedisServers], None],
    tmp_path: Path,
) -> None:
    """During the run and at the start. Outage and recovery are one log line each of store and queue."""
    with (
        kind(tmp_path) as servers,
        closing(servers),
        scripted_model() as model,
        _start_proxy(servers.url, model.target) as running,
    ):
        _miss_seconds(running.proxy, "before")
        assert not _warnings(running.proxy)
        begin_outage(servers)
        seconds = {"miss at run": _miss_seconds(running.proxy, "at run")}
        with _start_proxy(servers.url, model.target) as other:
            seconds["start's delay"] = other.start_seconds - running.start_seconds
            seconds["miss at start"] = _miss_seconds(other.proxy, "at start")
            seconds["second miss"] = _miss_seconds(other.proxy, "at start again")
            for proxy in (running.proxy, other.proxy):
                for line in (_DOWN, _LOST):
                    wait_for(lambda: proxy.log.count(line), description=line)  # noqa: B023 - called at once
            for proxy in (running.proxy, other.proxy):
                assert len(_warnings(proxy)) == 2, _warnings(proxy)
            seconds["stop"] = _stop_seconds(other.proxy)
        servers.recover()
        for line in (_UP, _BACK):
            wait_for(lambda: running.proxy.log.count(line), description=line)  # noqa: B023 - called at once
        wait_for(
            lambda: read_metrics(running.proxy.http_url)["cache_proxy_degraded",] == 0,
            description="it is no longer degraded",
        )
        _miss_seconds(running.proxy, "after")
        begin_outage(servers)
        seconds["stop at once"] = _stop_seconds(running.proxy)
        servers.recover()
    assert max(seconds["miss at run"], seconds["miss at start"]) <= _MAX_MISS_SECONDS, seconds
    assert seconds["second miss"] <= _MAX_MISS_SECONDS, seconds
    assert seconds["start's delay"] <= _MAX_START_DELAY_SECONDS, seconds
    assert max(seconds["stop"], seconds["stop at once"]) <= _MAX_STOP_SECONDS, seconds
    assert "Traceback" not in running.proxy.log + other.proxy.log


@pytest.mark.parametrize("begin_outage", _OUTAGES.values(), ids=_OUTAGES)
@pytest.mark.parametrize("number", range(3))
def test_outage_of_one_of_three_sentinels_delays_nothing(
    begin_outage: Callable[[_RedisServers], None], number: int, tmp_path: Path
) -> None:
    """Whichever Sentinel fails, no outage is logged, and starts and misses take their usual time."""
    with (
        _sentinel_service(tmp_path) as servers,
        scripted_model() as model,
        _start_proxy(servers.url, model.target) as running,
        ExitStack() as stack,
    ):
        usual_seconds = max(_miss_seconds(running.proxy, "usual"), 0.25)
        sentinel = stack.enter_context(closing(_RedisServers(servers.url, [servers.servers[number]])))
        begin_outage(sentinel)
        seconds = {"miss at run": _miss_seconds(running.proxy, "at run")}
        with _start_proxy(servers.url, model.target) as other:
            seconds["start's delay"] = other.start_seconds - running.start_seconds
            seconds["miss"] = _miss_seconds(other.proxy, "at start")
            seconds["stop"] = _stop_seconds(other.proxy)
        assert not _warnings(running.proxy) + _warnings(other.proxy)
    assert max(seconds["miss at run"], seconds["miss"]) <= 4 * usual_seconds, seconds
    assert seconds["start's delay"] <= _MAX_START_DELAY_SECONDS, seconds
    assert seconds["stop"] <= _MAX_STOP_SECONDS, seconds


@pytest.mark.parametrize(
    "url",
    [
        "redis://no-such-host.invalid:6379",
        "rediss://no-such-host.invalid:6379",
        "redis+cluster://no-such-host.invalid:7000,neither-this.invalid:7000",
        "redis+sentinel://no-such-host.invalid:26379,neither-this.invalid/cache",
    ],
)
def test_unresolvable_host_is_logged_once_by_each_component(url: str) -> None:
    """During ten seconds of requests there is one line of store and queue each, and nothing is delayed."""
    with scripted_model() as model, _start_proxy(url, model.target) as other:
        proxy = other.proxy
        end_at = time.monotonic() + 10
        misses: list[float] = []
        while time.monotonic() < end_at:
            misses.append(_miss_seconds(proxy, f"unresolved {len(misses)}"))
            time.sleep(0.2)
        warnings = _warnings(proxy)
        stop_seconds = _stop_seconds(proxy)
    assert sorted(line in warning for warning in warnings for line in (_DOWN, _LOST)) == [
        False,
        False,
        True,
        True,
    ]
    assert "never retrieved" not in proxy.log
    assert "Traceback" not in proxy.log
    assert other.start_seconds <= 10
    assert max(misses) <= _MAX_MISS_SECONDS
    assert stop_seconds <= _MAX_STOP_SECONDS
