"""Answers that are expired, invalidated or of the previous version, as callers of proxies see them."""

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
from tests.support.redis_server import RedisServer, wait_for

_prefixes = (f"versions{number}" for number in count())


@pytest.fixture
def flags(shared_redis: str) -> tuple[str, ...]:
    """Return the flags of a deployment for this test only."""
    return ("--cache-url", shared_redis, "--key-prefix", next(_prefixes), *UNLIMITED_RATE_FLAGS)


def _answer_next_levels(call: ReceivedCall) -> Answers:
    """Answer as a new model would: each level is another one than before."""
    return [(uuid, level % 7 + 1) for uuid, level in answer_all(call)]


def _is_written(stage: ProxyEnvironment) -> bool:
    return read_metrics(stage.proxy.http_url).get(("cache_proxy_store_duration_seconds_count", "put"), 0) > 0


def _invalidate(flags: tuple[str, ...], *selection: str) -> str:
    finished = run_command("services.cache_proxy", "invalidate", *selection, *flags[:4])
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_answers_of_previous_version_are_served_and_refreshed(
    stage_with: StartProxyEnvironment, flags: tuple[str, ...]
) -> None:
    """A new version serves the answers of the old one at once and infers them again in the background.

    After a rollback, the old answers are served at once.
    """
    pairs = make_pairs("versioned", 40)
    old = stage_with(*flags, "--model-version", "1")
    before = old.caller.infer(pairs).levels
    wait_for(lambda: _is_written(old), description="the answers are stored")
    old.model.behaviour = _answer_next_levels
    new = stage_with(*flags, "--model-version", "2", "--previous-model-version", "1", model=old.model)
    first = new.caller.infer(pairs)
    assert (first.levels, first.hits) == (before, 40)
    after = [level % 7 + 1 for level in before]
    wait_for(lambda: new.caller.infer(pairs).levels == after, description="the new version's answers")
    samples = read_metrics(new.proxy.http_url)
    assert samples["cache_proxy_pairs_total", "stale"] >= 40
    # Each pair was inferred once by each version.
    assert len(old.model.received_pairs()) == 80
    rolled_back = stage_with(*flags, "--model-version", "1", model=old.model)
    assert rolled_back.caller.infer(pairs).levels == before
    assert len(old.model.received_pairs()) == 80


@pytest.mark.parametrize("serve_stale", [pytest.param(True, marks=pytest.mark.slow), False])
def test_expired_answers_are_inferred_again(
    stage_with: StartProxyEnvironment, own_redis: RedisServer, serve_stale: bool
) -> None:
    """Answers older than `--cache-ttl` are inferred again; with `--serve-stale` they are served first."""
    stage = stage_with("--cache-url", own_redis.url, *UNLIMITED_RATE_FLAGS)
    pairs = make_pairs("old", 10)
    before = stage.caller.infer(pairs).levels
    # The stop writes pending answers.
    stage.proxy.stop()
    _age(own_redis, days=40)
    stage.model.behaviour = _answer_next_levels
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
    result = later.caller.infer(pairs)
    assert (result.levels, result.hits) == ((before, 10) if serve_stale else (after, 0))
    wait_for(lambda: later.caller.infer(pairs).levels == after, description="new answers")
    assert len(stage.model.received_pairs()) == 20


@pytest.mark.slow
def test_expired_answers_of_previous_version_are_not_served(
    stage_with: StartProxyEnvironment, own_redis: RedisServer
) -> None:
    """An answer of the previous version that is older than `--cache-ttl` is inferred again."""
    pairs = make_pairs("old version", 10)
    old = stage_with("--cache-url", own_redis.url, "--model-version", "1", *UNLIMITED_RATE_FLAGS)
    before = old.caller.infer(pairs).levels
    old.proxy.stop()
    _age(own_redis, days=300)
    old.model.behaviour = _answer_next_levels
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
    result = new.caller.infer(pairs)
    assert (result.levels, result.hits) == ([level % 7 + 1 for level in before], 0)


@pytest.mark.slow
@pytest.mark.parametrize("wrong_days", [-40, 40])
def test_proxy_with_wrong_clock_serves_and_infers_as_others_do(
    stage_with: StartProxyEnvironment, own_redis: RedisServer, tmp_path: Path, wrong_days: int
) -> None:
    """With a clock weeks ahead or behind, freshness is decided by the clock of Redis."""
    flags = ("--cache-url", own_redis.url, "--cache-ttl", "30d", *UNLIMITED_RATE_FLAGS)
    right = stage_with(*flags)
    old, fresh, new = (make_pairs(name, 10) for name in ("old", "fresh", "new"))
    right.caller.infer(old)
    wait_for(lambda: _is_written(right), description="the answers are stored")
    right.proxy.stop()
    _age(own_redis, days=31)
    right = stage_with(*flags, model=right.model)
    right.caller.infer(fresh)
    wait_for(lambda: _is_written(right), description="the answers are stored")
    # The core of gRPC reads the system clock itself, so only the clock of this project's modules is changed.
    (tmp_path / "sitecustomize.py").write_text(
        "import time, types\n"
        "from services.cache_proxy.cache import entry, store_clock\n"
        f"wrong_time = lambda: time.time() + {wrong_days} * 86400\n"
        "entry.time = store_clock.time = types.SimpleNamespace(time=wrong_time, monotonic=time.monotonic)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with (
        cache_proxy("--model-target", right.model.target, *flags, env=environment) as proxy,
        open_caller(proxy.target) as caller,
    ):
        assert caller.infer(fresh).hits == 10
        # These hits are from L1.
        assert caller.infer(fresh).hits == 10
        assert caller.infer(old).hits == 0
        assert caller.infer(new).hits == 0
        assert caller.infer(old + new).hits == 20
        difference_seconds = read_metrics(proxy.http_url)["cache_proxy_clock_difference_seconds",]
        assert difference_seconds == pytest.approx(wrong_days * 86_400, abs=60)
    assert right.caller.infer(old + new).hits == 20
    assert len(right.model.received_pairs()) == 40


def _age(server: RedisServer, *, days: int) -> None:
    """Make all stored answers so many days older."""
    with redis.Redis(port=server.port) as client:
        for key in client.scan_iter(match="*:recent:*"):
            client.delete(key)
        for key in client.scan_iter(match="*:c2:*"):
            if client.type(key) == b"hash":
                for field, value in client.hgetall(key).items():
                    # The field of a pair. Its value is day * 7 + level, minus a constant.
                    if len(field) == 11:
                        client.hset(key, field, int(value) - 7 * days)


def test_invalidation_reaches_every_replica_within_a_second(
    stage_with: StartProxyEnvironment, flags: tuple[str, ...]
) -> None:
    """One pair, then all pairs: two replicas that had them in memory infer them again, and only those."""
    one = stage_with(*flags)
    two = stage_with(*flags, model=one.model)
    pairs = make_pairs("invalidated", 5)
    before = one.caller.infer(pairs).levels
    wait_for(lambda: two.caller.infer(pairs).hits == 5, description="the answers are stored")
    one.model.behaviour = _answer_next_levels
    assert "1 pair" in _invalidate(flags, "--company", pairs[0][0], "--title", pairs[0][1])
    after = [before[0] % 7 + 1, *before[1:]]
    for stage in (one, two):
        wait_for(
            lambda: stage.caller.infer(pairs).levels == after,  # noqa: B023 - called at once
            timeout_seconds=5,
            description="the new answer",
        )
    assert len(one.model.received_pairs()) == 6
    _invalidate(flags, "--all")
    changed = [level % 7 + 1 for level in before]
    for stage in (two, one):
        wait_for(
            lambda: stage.caller.infer(pairs).levels == changed,  # noqa: B023 - called at once
            timeout_seconds=5,
            description="all new answers",
        )
    assert len(one.model.received_pairs()) == 11


def test_answer_invalidated_during_model_call_is_not_cached(
    stage_with: StartProxyEnvironment, flags: tuple[str, ...]
) -> None:
    """The waiting caller gets the answer; the next request infers the pair again."""
    stage = stage_with(*flags)
    pair = make_pairs("during call", 1)

    def invalidate_then_answer(call: ReceivedCall) -> Answers:
        _invalidate(flags, "--company", pair[0][0], "--title", pair[0][1])
        return answer_all(call)

    stage.model.behaviour = invalidate_then_answer
    assert stage.caller.infer(pair).levels == [scripted_level(*pair[0])]
    stage.model.behaviour = _answer_next_levels
    wait_for(
        lambda: stage.caller.infer(pair).levels == [scripted_level(*pair[0]) % 7 + 1],
        timeout_seconds=5,
        description="it is inferred again",
    )


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["pair", "all"])
def test_answer_kept_during_outage_is_not_stored_after_invalidation(
    stage_with: StartProxyEnvironment, own_redis: RedisServer, selection: str
) -> None:
    """A replica without Redis infers a pair that is invalidated: no later caller gets that answer."""
    pair = make_pairs("cut off", 1)
    old_level = scripted_level(*pair[0])
    direct = ("--cache-url", own_redis.url, "--key-prefix", "cut", *UNLIMITED_RATE_FLAGS)
    with faulty_link(own_redis.port) as link:
        stage = stage_with("--cache-url", link.url, *direct[2:])
        stage.caller.infer(make_pairs("before", 1))
        wait_for(lambda: _is_written(stage), description="the key schema and the first answer are stored")
        link.drop_traffic()
        assert stage.caller.infer(pair).levels == [old_level]
        wait_for(lambda: "going on alone" in stage.proxy.log, description="it has lost Redis")
        _invalidate(direct, *(["--all"] if selection == "all" else _pair_flags(pair[0])))
        stage.model.behaviour = _answer_next_levels
        link.restore()
        wait_for(lambda: "queue is back" in stage.proxy.log, description="the queue is back")
        wait_for(
            lambda: read_metrics(stage.proxy.http_url)["cache_proxy_store_up",],
            description="the store is back",
        )
        wait_for(
            lambda: stage.caller.infer(pair).levels == [old_level % 7 + 1],
            timeout_seconds=3,
            description="it is inferred again",
        )
        other = stage_with(*direct, model=stage.model)
        assert other.caller.infer(pair).levels == [old_level % 7 + 1]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["after the answer", "during the call"])
def test_invalidation_reaches_proxy_with_embedded_store(
    stage_with: StartProxyEnvironment, tmp_path: Path, when: str
) -> None:
    """Outcomes remembered by its local queue and answers of running model calls are not served."""
    flags = ("--cache-url", f"embedded:{tmp_path / 'own'}", "--key-prefix", "own", *UNLIMITED_RATE_FLAGS)
    stage = stage_with(*flags)
    pair = make_pairs("own", 1)
    stage.caller.infer(make_pairs("before", 1))
    wait_for(lambda: _is_written(stage), description="the key schema and the first answer are stored")

    def invalidate_then_answer(call: ReceivedCall) -> Answers:
        _invalidate(flags, *_pair_flags(pair[0]))
        return answer_all(call)

    if when == "during the call":
        stage.model.behaviour = invalidate_then_answer
    old_level = scripted_level(*pair[0])
    assert stage.caller.infer(pair).levels == [old_level]
    stage.model.behaviour = _answer_next_levels
    if when == "after the answer":
        _invalidate(flags, *_pair_flags(pair[0]))
    wait_for(
        lambda: stage.caller.infer(pair).levels == [old_level % 7 + 1],
        timeout_seconds=3,
        description="it is inferred again",
    )


def _pair_flags(pair: tuple[str, str]) -> list[str]:
    """Return the flags of `invalidate` for one pair."""
    return ["--company", pair[0], "--title", pair[1]]
