"""The proxy and its store: shared, kept over restarts, down, slow and gone."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import scripted_level, scripted_model
from tests.support.processes import ServiceProcess, cache_proxy, run_command
from tests.support.redis_server import RedisServer, redis_process, wait_for

PATIENT = ("--cache-timeout", "10s")
"""For tests of what is in Redis: a busy machine does not make it a Redis that is lost."""


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own, to kill and pause."""
    with redis_process(tmp_path) as server:
        yield server


def test_two_proxies_on_one_redis_share_answers_over_restarts(
    stage_with: StartProxyEnvironment, shared_redis: str
) -> None:
    """What one asked the other knows, and so does a third that starts later; another deployment's prefix,
    model version, secret or normal form does not.
    """  # noqa: D205 - one thought
    flags = ("--cache-url", shared_redis, "--key-prefix", "shared", *UNLIMITED_RATE_FLAGS, *PATIENT)
    pairs = make_pairs("shared", 30)
    first = stage_with(*flags)
    assert first.caller.infer(pairs).misses == 30
    _wait_until_saved(first)
    second = stage_with(*flags, "--model-version", "1", model=first.model)
    assert second.caller.infer(pairs).hits == 30
    found = read_metrics(second.proxy.http_url)
    assert found["cache_proxy_pairs_total", "l2"] == 30
    assert found["cache_proxy_store_duration_seconds_count", "get"] >= 1
    other = stage_with(*flags, "--model-version", "2", model=first.model)
    assert other.caller.infer(pairs).misses == 30


def _wait_until_saved(stage: ProxyEnvironment) -> None:
    """An answer is on its way before it is written."""
    puts = "cache_proxy_store_duration_seconds_count", "put"
    wait_for(lambda: read_metrics(stage.proxy.http_url).get(puts), description="the answers are written")


def _asks_well(stage: ProxyEnvironment, company: str, *, count: int = 20) -> float:
    """Ask for new pairs; the seconds it took."""
    started_at = time.monotonic()
    reply = stage.caller.infer(make_pairs(company, count), timeout_seconds=30)
    assert reply.levels == [scripted_level(*pair) for pair in make_pairs(company, count)]
    return time.monotonic() - started_at


@pytest.mark.slow
@pytest.mark.alone
def test_callers_are_answered_whatever_redis_does(
    stage_with: StartProxyEnvironment, own_redis: RedisServer
) -> None:
    """Down at start, back, killed under load, back, paused, back: always answers, in time, one warning a
    change, and what was answered meanwhile is saved.
    """  # noqa: D205 - one thought
    own_redis.kill()
    stage = stage_with("--cache-url", own_redis.url, "--cache-timeout", "1s", *UNLIMITED_RATE_FLAGS)
    _asks_well(stage, "down at start")
    own_redis.start()
    wait_for(lambda: _up(stage.proxy), description="the store is back")

    going, failed = threading.Event(), []

    def load(name: str) -> None:
        with open_caller(stage.proxy.target) as asking:
            number = 0
            while not going.is_set():
                number += 1
                reply = asking.infer(make_pairs(f"load {name} {number}", 5), timeout_seconds=30)
                if reply.code is not StatusCode.OK:
                    failed.append(reply)

    threads = [threading.Thread(target=load, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    own_redis.kill()
    wait_for(lambda: not _up(stage.proxy), description="the loss is noticed")
    _asks_well(stage, "while killed")
    own_redis.start()
    wait_for(lambda: _up(stage.proxy), description="the store is back again")
    own_redis.pause()
    assert _asks_well(stage, "while paused") < 15  # store and queue each find out
    wait_for(lambda: not _up(stage.proxy), description="the silence is noticed")
    going.set()
    for thread in threads:
        thread.join(60)
    assert not failed
    took = _asks_well(stage, "while down") + _asks_well(stage, "while still down")
    assert took < 2  # the second would have waited for two timeouts
    own_redis.resume()
    wait_for(lambda: _up(stage.proxy), description="the store is back once more")
    assert stage.proxy.stop() == 0
    assert stage.proxy.log.count("the store is down") == 3
    assert stage.proxy.log.count("the store is back") == 3
    assert "Traceback" not in stage.proxy.log
    with (
        cache_proxy("--model-target", "127.0.0.1:1", "--cache-url", own_redis.url, *PATIENT) as later,
        open_caller(later.target) as asking,
    ):
        for company in ("down at start", "while killed", "while paused", "while down", "while still down"):
            assert asking.infer(make_pairs(company, 20)).hits == 20


def _up(proxy: ServiceProcess) -> bool:
    return read_metrics(proxy.http_url)["cache_proxy_store_up",] == 1


def _servers(folder: Path) -> list[int]:
    """The processes whose working directory is this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_an_embedded_store_outlives_a_kill_and_leaves_no_server(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """Kill -9 of the proxy: its server ends too, and the next proxy on the folder has the answers; SIGTERM
    ends both.
    """  # noqa: D205 - one thought
    folder = tmp_path / ("a long name " * 12).strip() / "store"
    flags = ("--cache-url", f"embedded:{folder}", *UNLIMITED_RATE_FLAGS)
    first = stage_with(*flags)
    pairs = make_pairs("embedded", 200)
    assert first.caller.infer(pairs).code is StatusCode.OK
    assert len(_servers(folder)) == 1
    wait_for(lambda: _saved(folder, 200), description="the answers are in the file")
    first.proxy.stop(signal.SIGKILL)
    second = stage_with(*flags, model=first.model)
    assert second.caller.infer(pairs).hits == 200
    assert len(_servers(folder)) == 1
    assert second.proxy.stop() == 0
    assert _servers(folder) == []


def _saved(folder: Path, pairs: int) -> bool:
    return sum(path.stat().st_size for path in (folder / "appendonlydir").glob("*.incr.aof")) > pairs * 17


@pytest.mark.slow
def test_an_embedded_server_that_dies_is_started_again(
    stage_with: StartProxyEnvironment, tmp_path: Path
) -> None:
    """Callers are answered meanwhile, and the answers are there afterwards."""
    stage = stage_with("--cache-url", f"embedded:{tmp_path}", *UNLIMITED_RATE_FLAGS)
    _asks_well(stage, "before")
    [server] = _servers(tmp_path)
    os.kill(server, signal.SIGKILL)
    wait_for(
        lambda: server not in _servers(tmp_path) and _servers(tmp_path), description="there is a new server"
    )
    _asks_well(stage, "after")
    wait_for(lambda: _up(stage.proxy), description="the store is back")
    stage.proxy.stop()
    later = stage_with("--cache-url", f"embedded:{tmp_path}", model=stage.model)
    assert later.caller.infer([*make_pairs("before", 20), *make_pairs("after", 20)]).hits == 40


@pytest.mark.slow
def test_a_second_proxy_on_the_folder_is_refused(stage_with: StartProxyEnvironment, tmp_path: Path) -> None:
    """One clear line with the owner's process, exit code 1, and the first goes on."""
    stage = stage_with("--cache-url", f"embedded:{tmp_path}", *UNLIMITED_RATE_FLAGS)
    ended = _start(f"embedded:{tmp_path}")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert str(tmp_path) in ended.stderr
    assert str(stage.proxy.process.pid) in ended.stderr
    _asks_well(stage, "goes on")


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_folder_that_cannot_be_one_is_one_line(place: str, tmp_path: Path) -> None:
    """A file, a place below a file, a place that takes no folders: exit code 1, the folder named."""
    (tmp_path / "file").touch()
    folder = tmp_path / place
    ended = _start(f"embedded:{folder}")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1), ended.stderr
    assert str(folder) in ended.stderr


def _start(url: str) -> "subprocess.CompletedProcess[str]":
    return run_command(
        "services.cache_proxy",
        "serve",
        "--model-target",
        "127.0.0.1:1",
        "--cache-url",
        url,
        "--listen",
        "127.0.0.1:0",
        "--http-listen",
        "127.0.0.1:0",
    )


@pytest.mark.slow
def test_a_secret_keys_the_cache(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """Another secret knows nothing of the answers, the same one all of them; it is never logged."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"hunter2\xff\n")
    flags = ("--cache-url", shared_redis, "--key-prefix", "secret", *UNLIMITED_RATE_FLAGS, *PATIENT)
    plain = stage_with(*flags)
    pairs = make_pairs("secret", 5)
    plain.caller.infer(pairs)
    _wait_until_saved(plain)
    for misses in (5, 0):
        keyed = stage_with(*flags, "--key-secret-file", str(secret), model=plain.model)
        assert keyed.caller.infer(pairs).misses == misses
        assert keyed.proxy.stop() == 0  # now all is written, also its log
        assert "hunter2" not in keyed.proxy.log


def test_exact_keeps_spellings_apart_and_fold_does_not(stage_with: StartProxyEnvironment) -> None:
    """`--normalize exact`: each spelling is a pair of its own."""
    stage = stage_with("--normalize", "exact", *UNLIMITED_RATE_FLAGS)
    pairs = [("Exact", "T"), ("EXACT", "T"), ("Exact ", "T"), ("Exact", "t")]
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]
    assert len(stage.model.received_pairs()) == 4


@pytest.mark.slow
def test_a_wrong_password_is_a_store_that_is_down_and_is_not_shown(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    """Callers are answered; the log has one warning, and no password in it."""
    with own_redis.client() as client:
        client.config_set("requirepass", "s3cret")
    path = tmp_path / "password"
    path.write_bytes(b"hunter2\xff\n")
    url = own_redis.url.replace("redis://", "redis://:hunter3@")
    by_file = ("--cache-url", own_redis.url, "--cache-password-file", str(path))
    for flags, env in (((), {"CACHE_PROXY_CACHE_URL": url}), (by_file, {})):
        with (
            scripted_model() as model,
            cache_proxy("--model-target", model.target, *flags, *UNLIMITED_RATE_FLAGS, env=env) as proxy,
            open_caller(proxy.target) as asking,
        ):
            assert asking.infer([("password", "t")]).code is StatusCode.OK
            assert proxy.stop() == 0
            assert "hunter" not in proxy.log
            assert proxy.log.count("the store is down") == 1
    path.write_bytes(b"s3cret\n")
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            own_redis.url,
            "--cache-password-file",
            str(path),
            *UNLIMITED_RATE_FLAGS,
            *PATIENT,
        ) as proxy,
        open_caller(proxy.target) as asking,
    ):
        assert asking.infer([("password", "t")]).code is StatusCode.OK
        assert "s3cret" not in proxy.log
        assert _up(proxy)
        with redis.Redis(port=own_redis.port, password="s3cret") as client:
            wait_for(lambda: any(b":c2:" in key for key in client.scan_iter()), description="it is written")


@pytest.mark.slow
def test_a_redis_that_evicts_any_key_is_warned_of_once(own_redis: RedisServer) -> None:
    """One loud line and a gauge; with a policy that spares the queue, neither."""
    for policy, evicts in (("allkeys-lru", 1), ("volatile-lru", 0), ("noeviction", 0)):
        with own_redis.client() as client:
            client.config_set("maxmemory-policy", policy)
        with cache_proxy("--model-target", "127.0.0.1:1", "--cache-url", own_redis.url) as proxy:
            if evicts:
                wait_for(lambda: policy in proxy.log, description="the warning")  # noqa: B023 - called within the turn
            else:
                wait_for(
                    lambda: read_metrics(proxy.http_url)["cache_proxy_live_replicas",],
                    description="it is in touch",
                )
            assert read_metrics(proxy.http_url)["cache_proxy_store_evicts",] == evicts
            assert proxy.log.count("maxmemory-policy") == evicts
