"""Answers that are too old, another version's, or invalidated, as callers of real proxies see them."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import redis

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.faulty_link import faulty_link
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_level
from tests.support.processes import ROOT, cache_proxy, run_command
from tests.support.redis_server import RedisServer, redis_process, wait_for

_prefixes = (f"versions{number}" for number in count())


@pytest.fixture
def flags(shared_redis: str) -> tuple[str, ...]:
    """A deployment of the test's own."""
    return ("--cache-url", shared_redis, "--key-prefix", next(_prefixes), *UNLIMITED_RATE_FLAGS)


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A server of the test's own."""
    with redis_process(tmp_path) as server:
        yield server


def _another(call: ReceivedCall) -> Answers:
    """A model that has changed its mind about everything."""
    return [(uuid, level % 7 + 1) for uuid, level in answer_all(call)]


def _written(stage: ProxyEnvironment) -> bool:
    return read_metrics(stage.proxy.http_url).get(("cache_proxy_store_duration_seconds_count", "put"), 0) > 0


def _invalidate(flags: tuple[str, ...], *what: str) -> str:
    done = run_command("services.cache_proxy", "invalidate", *what, *flags[:4])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_previous_versions_answers_are_served_and_refreshed_behind(
    stage_with: StartProxyEnvironment, flags: tuple[str, ...]
) -> None:
    """A new version answers at once with the old one's answers, and soon with its own; rolled back, the old
    ones are there at once.
    """  # noqa: D205 - one thought
    pairs = make_pairs("versioned", 40)
    old = stage_with(*flags, "--model-version", "1")
    before = old.caller.infer(pairs).levels
    wait_for(lambda: _written(old), description="the store has them")
    old.model.behaviour = _another
    new = stage_with(*flags, "--model-version", "2", "--previous-model-version", "1", model=old.model)
    first = new.caller.infer(pairs)
    assert (first.levels, first.hits) == (before, 40)
    after = [level % 7 + 1 for level in before]
    wait_for(lambda: new.caller.infer(pairs).levels == after, description="the new version's answers")
    found = read_metrics(new.proxy.http_url)
    assert found["cache_proxy_pairs_total", "stale"] >= 40
    assert len(old.model.received_pairs()) == 80  # once for each version
    back = stage_with(*flags, "--model-version", "1", model=old.model)
    assert back.caller.infer(pairs).levels == before
    assert len(old.model.received_pairs()) == 80


@pytest.mark.parametrize("serve_stale", [pytest.param(True, marks=pytest.mark.slow), False])
def test_answers_that_are_too_old_are_inferred_again(
    stage_with: StartProxyEnvironment, own_redis: RedisServer, serve_stale: bool
) -> None:
    """Older than the days of `--cache-ttl`: inferred again; with `--serve-stale` served meanwhile."""
    stage = stage_with("--cache-url", own_redis.url, *UNLIMITED_RATE_FLAGS)
    pairs = make_pairs("old", 10)
    before = stage.caller.infer(pairs).levels
    stage.proxy.stop()  # which writes what is not written yet
    _age(own_redis, days=40)
    stage.model.behaviour = _another
    later = stage_with(
        "--cache-url",
        own_redis.url,
        "--cache-ttl",
        "30d",
        "--serve-stale",
        str(serve_stale).lower(),
        *UNLIMITED_RATE_FLAGS,
        model=stage.model,
    )
    after = [level % 7 + 1 for level in before]
    reply = later.caller.infer(pairs)
    assert (reply.levels, reply.hits) == ((before, 10) if serve_stale else (after, 0))
    wait_for(lambda: later.caller.infer(pairs).levels == after, description="new answers")
    assert len(stage.model.received_pairs()) == 20


@pytest.mark.slow
def test_the_previous_versions_answers_age_too(
    stage_with: StartProxyEnvironment, own_redis: RedisServer
) -> None:
    """Older than `--cache-ttl`, another version's answer is not served: the model is asked."""
    pairs = make_pairs("old version", 10)
    old = stage_with("--cache-url", own_redis.url, "--model-version", "1", *UNLIMITED_RATE_FLAGS)
    before = old.caller.infer(pairs).levels
    old.proxy.stop()
    _age(own_redis, days=300)
    old.model.behaviour = _another
    new = stage_with(
        "--cache-url",
        own_redis.url,
        "--model-version",
        "2",
        "--previous-model-version",
        "1",
        "--cache-ttl",
        "30d",
        *UNLIMITED_RATE_FLAGS,
        model=old.model,
    )
    reply = new.caller.infer(pairs)
    assert (reply.levels, reply.hits) == ([level % 7 + 1 for level in before], 0)


@pytest.mark.slow
@pytest.mark.parametrize("wrong_days", [-40, 40])
def test_a_proxy_with_a_wrong_clock_serves_and_infers_as_the_others(
    stage_with: StartProxyEnvironment, own_redis: RedisServer, tmp_path: Path, wrong_days: int
) -> None:
    """Weeks ahead or behind: it serves what is fresh by Redis's clock, and asks once for what is not."""
    flags = ("--cache-url", own_redis.url, "--cache-ttl", "30d", *UNLIMITED_RATE_FLAGS)
    right = stage_with(*flags)
    old, fresh, new = (make_pairs(name, 10) for name in ("old", "fresh", "new"))
    right.caller.infer(old)
    wait_for(lambda: _written(right), description="the store has them")
    right.proxy.stop()
    _age(own_redis, days=31)
    right = stage_with(*flags, model=right.model)
    right.caller.infer(fresh)
    wait_for(lambda: _written(right), description="the store has them")
    (tmp_path / "sitecustomize.py").write_text(
        "import time, types\n"  # gRPC's core reads the system's clock itself, so only the project's is moved
        "from services.cache_proxy.cache import entry as dated, store_clock as clock\n"
        f"wrong = lambda: time.time() + {wrong_days} * 86400\n"
        "clock.time = dated.time = types.SimpleNamespace(time=wrong, monotonic=time.monotonic)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with (
        cache_proxy("--model-target", right.model.target, *flags, env=environment) as proxy,
        open_caller(proxy.target) as wrong,
    ):
        assert wrong.infer(fresh).hits == 10
        assert wrong.infer(fresh).hits == 10  # from L1
        assert wrong.infer(old).hits == 0
        assert wrong.infer(new).hits == 0
        assert wrong.infer(old + new).hits == 20
        shown = read_metrics(proxy.http_url)["cache_proxy_clock_difference_seconds",]
        assert shown == pytest.approx(wrong_days * 86_400, abs=60)
    assert right.caller.infer(old + new).hits == 20
    assert len(right.model.received_pairs()) == 40


def _age(server: RedisServer, *, days: int) -> None:
    """As if all answers had been given so many days before."""
    with redis.Redis(port=server.port) as client:
        for key in client.scan_iter(match="*:recent:*"):
            client.delete(key)
        for key in client.scan_iter(match="*:c2:*"):
            if client.type(key) == b"hash":
                for field, value in client.hgetall(key).items():
                    if len(field) == 11:  # a pair's; a value is day * 7 + level, less a constant
                        client.hset(key, field, int(value) - 7 * days)


def test_an_invalidated_pair_leaves_every_replica_within_a_second(
    stage_with: StartProxyEnvironment, flags: tuple[str, ...]
) -> None:
    """One pair, then all: two replicas that had it in memory ask the model anew; the others stay."""
    one = stage_with(*flags)
    two = stage_with(*flags, model=one.model)
    pairs = make_pairs("buried", 5)
    before = one.caller.infer(pairs).levels
    wait_for(lambda: two.caller.infer(pairs).hits == 5, description="the store has them")
    one.model.behaviour = _another
    assert "1 pair" in _invalidate(flags, "--company", pairs[0][0], "--title", pairs[0][1])
    after = [before[0] % 7 + 1, *before[1:]]
    for stage in (one, two):
        wait_for(
            lambda: stage.caller.infer(pairs).levels == after,  # noqa: B023 - called at once
            timeout_seconds=5,
            description="it is gone",
        )
    assert len(one.model.received_pairs()) == 6
    _invalidate(flags, "--all")
    changed = [level % 7 + 1 for level in before]
    for stage in (two, one):
        wait_for(
            lambda: stage.caller.infer(pairs).levels == changed,  # noqa: B023 - called at once
            timeout_seconds=5,
            description="all are gone",
        )
    assert len(one.model.received_pairs()) == 11


def test_an_answer_in_flight_is_given_but_not_remembered(
    stage_with: StartProxyEnvironment, flags: tuple[str, ...]
) -> None:
    """Invalidated while the model works on it: who asked is answered; who asks next has it inferred anew."""
    stage = stage_with(*flags)
    pair = make_pairs("in flight", 1)

    def invalidated(call: ReceivedCall) -> Answers:
        _invalidate(flags, "--company", pair[0][0], "--title", pair[0][1])
        return answer_all(call)

    stage.model.behaviour = invalidated
    assert stage.caller.infer(pair).levels == [scripted_level(*pair[0])]
    stage.model.behaviour = _another
    wait_for(
        lambda: stage.caller.infer(pair).levels == [scripted_level(*pair[0]) % 7 + 1],
        timeout_seconds=5,
        description="asked anew",
    )


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pair", "all"])
def test_an_answer_kept_through_a_cut_does_not_come_back(
    stage_with: StartProxyEnvironment, own_redis: RedisServer, what: str
) -> None:
    """Inferred by a replica that was cut off, and invalidated meanwhile: later nobody is given it."""
    pair = make_pairs("cut off", 1)
    old = scripted_level(*pair[0])
    direct = ("--cache-url", own_redis.url, "--key-prefix", "cut", *UNLIMITED_RATE_FLAGS)
    with faulty_link(own_redis.port) as wire:
        stage = stage_with("--cache-url", wire.url, *direct[2:])
        stage.caller.infer(make_pairs("before", 1))
        wait_for(lambda: _written(stage), description="the deployment's note and first answer")
        wire.drop_traffic()
        assert stage.caller.infer(pair).levels == [old]
        wait_for(lambda: "going on alone" in stage.proxy.log, description="it has lost Redis")
        _invalidate(direct, *(["--all"] if what == "all" else _named(pair[0])))
        stage.model.behaviour = _another
        wire.restore()
        wait_for(lambda: "queue is back" in stage.proxy.log, description="it is back")
        wait_for(
            lambda: read_metrics(stage.proxy.http_url)["cache_proxy_store_up",],
            description="the store is back",
        )
        wait_for(
            lambda: stage.caller.infer(pair).levels == [old % 7 + 1],
            timeout_seconds=3,
            description="asked anew",
        )
        other = stage_with(*direct, model=stage.model)
        assert other.caller.infer(pair).levels == [old % 7 + 1]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["just answered", "in flight"])
def test_a_proxy_with_a_store_of_its_own_forgets_too(
    stage_with: StartProxyEnvironment, tmp_path: Path, when: str
) -> None:
    """What its own queue remembers of late, and what is on its way from the model."""
    flags = ("--cache-url", f"embedded:{tmp_path / 'own'}", "--key-prefix", "own", *UNLIMITED_RATE_FLAGS)
    stage, pair = stage_with(*flags), make_pairs("own", 1)
    stage.caller.infer(make_pairs("before", 1))
    wait_for(lambda: _written(stage), description="the deployment's note and first answer")

    def invalidated(call: ReceivedCall) -> Answers:
        _invalidate(flags, *_named(pair[0]))
        return answer_all(call)

    if when == "in flight":
        stage.model.behaviour = invalidated
    old = scripted_level(*pair[0])
    assert stage.caller.infer(pair).levels == [old]
    stage.model.behaviour = _another
    if when != "in flight":
        _invalidate(flags, *_named(pair[0]))
    wait_for(
        lambda: stage.caller.infer(pair).levels == [old % 7 + 1], timeout_seconds=3, description="asked anew"
    )


def _named(pair: tuple[str, str]) -> list[str]:
    return ["--company", pair[0], "--title", pair[1]]
