"""What callers notice when the servers of the cache are gone: every kind of URL, every way to be gone."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import scripted_level, scripted_model
from tests.support.processes import ServiceProcess, cache_proxy
from tests.support.redis_cluster import redis_cluster, sentinel_servers
from tests.support.redis_server import RedisServer, redis_process, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone]

_SERVICE = "cache"
_MAX_MISS_SECONDS = 5.0
_MAX_STOP_SECONDS = 3.0  # one or two, and the noise
# A few --cache-timeout (250 ms), and the noise of two starts on a busy machine.
_MAX_START_DELAY_SECONDS = 3.0
_DOWN, _UP = "the store is down", "the store is back"
_LOST, _BACK = "the shared queue is lost", "the shared queue is back"


@dataclass
class _Servers:
    """All the servers behind one URL."""

    url: str
    servers: Sequence[RedisServer]
    socket_path: Path | None = None
    _in_their_place: list[socket.socket] = field(default_factory=list)

    def refuse(self) -> None:
        """End them all: connections are refused."""
        for server in self.servers:
            server.kill()

    def freeze(self) -> None:
        """Stop them all (SIGSTOP): connections are accepted, and nothing is answered."""
        for server in self.servers:
            server.pause()

    def black_hole(self) -> None:
        """End them all, and have no new connection completed: the backlogs in their place are full."""
        self.refuse()
        for server in self.servers:
            self._fill_backlog(socket.AF_INET, ("127.0.0.1", server.port))
        if self.socket_path:
            self.socket_path.unlink(missing_ok=True)
            self._fill_backlog(socket.AF_UNIX, str(self.socket_path))

    def come_back(self) -> None:
        """Undo any of these."""
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
        self._in_their_place.append(listener)
        for _ in range(4):  # one more than fits, and to be sure
            near = socket.socket(family)
            near.setblocking(False)
            near.connect_ex(address)
            self._in_their_place.append(near)

    def close(self) -> None:
        """Close what this opened."""
        while self._in_their_place:
            self._in_their_place.pop().close()


@contextmanager
def _one(folder: Path) -> Iterator[_Servers]:
    with redis_process(folder) as server:
        yield _Servers(server.url, [server])


@contextmanager
def _on_a_socket(folder: Path) -> Iterator[_Servers]:
    path = folder / "redis.sock"
    with redis_process(folder, "--unixsocket", str(path)) as server:
        yield _Servers(f"unix://{path}", [server], path)


@contextmanager
def _cluster(folder: Path) -> Iterator[_Servers]:
    with redis_cluster(folder) as cluster:
        yield _Servers(cluster.url, cluster.nodes)


@contextmanager
def _behind_sentinels(folder: Path) -> Iterator[_Servers]:
    with ExitStack() as stack:
        for name in ("master", "replica"):
            (folder / name).mkdir()
        master = stack.enter_context(redis_process(folder / "master"))
        of_master = ("--replicaof", f"127.0.0.1 {master.port}")
        replica = stack.enter_context(redis_process(folder / "replica", *of_master))
        watching = stack.enter_context(
            sentinel_servers(folder, master_port=master.port, master_name=_SERVICE)
        )
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in watching)
        yield _Servers(f"redis+sentinel://{hosts}/{_SERVICE}", [*watching, master, replica])


_KINDS = {"redis": _one, "unix": _on_a_socket, "cluster": _cluster, "sentinel": _behind_sentinels}
_WAYS = {"refused": _Servers.refuse, "frozen": _Servers.freeze, "black-holed": _Servers.black_hole}


@dataclass
class _Start:
    proxy: ServiceProcess
    seconds: float


@contextmanager
def _started(url: str, model: str) -> Iterator[_Start]:
    began = time.monotonic()
    flags = ("--cache-url", url, "--model-target", model, *UNLIMITED_RATE_FLAGS)
    with cache_proxy(*flags) as proxy:
        yield _Start(proxy, time.monotonic() - began)


def _miss_seconds(proxy: ServiceProcess, name: str) -> float:
    """How long new pairs take; they are answered as the model does."""
    pairs = make_pairs(name, 20)
    with open_caller(proxy.target) as asking:
        began = time.monotonic()
        reply = asking.infer(pairs, timeout_seconds=30)
        took = time.monotonic() - began
    assert reply.levels == [scripted_level(*pair) for pair in pairs], (reply.code, reply.message)
    assert reply.misses == len(pairs)
    return took


def _stop_seconds(proxy: ServiceProcess) -> float:
    began = time.monotonic()
    assert proxy.stop() == 0
    return time.monotonic() - began


def _warnings(proxy: ServiceProcess) -> list[str]:
    return [line for line in proxy.log.splitlines() if '"INFO"' not in line]


@pytest.mark.parametrize("gone", _WAYS.values(), ids=_WAYS)
@pytest.mark.parametrize("kind", _KINDS.values(), ids=_KINDS)
def test_servers_of_the_cache_that_are_gone_delay_no_miss_no_start_and_no_stop(
    kind: Callable[[Path], AbstractContextManager[_Servers]],
    gone: Callable[[_Servers], None],
    tmp_path: Path,
) -> None:
    """At run and at start. The outage is one log line of the store and one of the queue; so is its end."""
    with (
        kind(tmp_path) as behind,
        closing(behind),
        scripted_model() as model,
        _started(behind.url, model.target) as well,
    ):
        _miss_seconds(well.proxy, "before")
        assert not _warnings(well.proxy)
        gone(behind)
        figures = {"miss at run": _miss_seconds(well.proxy, "at run")}
        with _started(behind.url, model.target) as alone:
            figures["start's delay"] = alone.seconds - well.seconds
            figures["miss at start"] = _miss_seconds(alone.proxy, "at start")
            figures["second miss"] = _miss_seconds(alone.proxy, "at start again")
            for proxy in (well.proxy, alone.proxy):
                for line in (_DOWN, _LOST):
                    wait_for(lambda: proxy.log.count(line), description=line)  # noqa: B023 - used at once
            for one in (well.proxy, alone.proxy):
                assert len(_warnings(one)) == 2, _warnings(one)
            figures["stop"] = _stop_seconds(alone.proxy)
        behind.come_back()
        for line in (_UP, _BACK):
            wait_for(lambda: well.proxy.log.count(line), description=line)  # noqa: B023 - used at once
        wait_for(
            lambda: read_metrics(well.proxy.http_url)["cache_proxy_degraded",] == 0,
            description="it is well again",
        )
        _miss_seconds(well.proxy, "after")
        gone(behind)
        figures["stop at once"] = _stop_seconds(well.proxy)
        behind.come_back()
    assert max(figures["miss at run"], figures["miss at start"]) <= _MAX_MISS_SECONDS, figures
    assert figures["second miss"] <= _MAX_MISS_SECONDS, figures
    assert figures["start's delay"] <= _MAX_START_DELAY_SECONDS, figures
    assert max(figures["stop"], figures["stop at once"]) <= _MAX_STOP_SECONDS, figures
    assert "Traceback" not in well.proxy.log + alone.proxy.log


@pytest.mark.parametrize("gone", _WAYS.values(), ids=_WAYS)
@pytest.mark.parametrize("number", range(3))
def test_one_of_three_sentinels_that_is_gone_costs_nothing(
    gone: Callable[[_Servers], None], number: int, tmp_path: Path
) -> None:
    """Whichever it is in the URL: no outage is logged, and a start and a miss take their usual time."""
    with (
        _behind_sentinels(tmp_path) as behind,
        scripted_model() as model,
        _started(behind.url, model.target) as well,
        ExitStack() as stack,
    ):
        usual = max(_miss_seconds(well.proxy, "usual"), 0.25)
        one = stack.enter_context(closing(_Servers(behind.url, [behind.servers[number]])))
        gone(one)
        figures = {"miss at run": _miss_seconds(well.proxy, "at run")}
        with _started(behind.url, model.target) as other:
            figures["start's delay"] = other.seconds - well.seconds
            figures["miss"] = _miss_seconds(other.proxy, "at start")
            figures["stop"] = _stop_seconds(other.proxy)
        assert not _warnings(well.proxy) + _warnings(other.proxy)
    assert max(figures["miss at run"], figures["miss"]) <= 4 * usual, figures
    assert figures["start's delay"] <= _MAX_START_DELAY_SECONDS, figures
    assert figures["stop"] <= _MAX_STOP_SECONDS, figures


@pytest.mark.parametrize(
    "url",
    [
        "redis://no-such-host.invalid:6379",
        "rediss://no-such-host.invalid:6379",
        "redis+cluster://no-such-host.invalid:7000,neither-this.invalid:7000",
        "redis+sentinel://no-such-host.invalid:26379,neither-this.invalid/cache",
    ],
)
def test_a_name_that_does_not_resolve_is_one_line_of_each_component(url: str) -> None:
    """For ten seconds with requests, as in any other outage; and no start, miss or stop is delayed."""
    with scripted_model() as model, _started(url, model.target) as alone:
        proxy, end_at = alone.proxy, time.monotonic() + 10
        misses: list[float] = []
        while time.monotonic() < end_at:
            misses.append(_miss_seconds(proxy, f"unresolved {len(misses)}"))
            time.sleep(0.2)
        warnings = _warnings(proxy)
        stop = _stop_seconds(proxy)
    assert sorted(line in each for each in warnings for line in (_DOWN, _LOST)) == [False, False, True, True]
    assert "never retrieved" not in proxy.log
    assert "Traceback" not in proxy.log
    assert alone.seconds <= 10
    assert max(misses) <= _MAX_MISS_SECONDS
    assert stop <= _MAX_STOP_SECONDS
