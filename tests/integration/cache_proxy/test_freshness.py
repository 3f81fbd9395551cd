"""Answers that are expired or of the previous model version, as callers of proxies see them."""

from itertools import count
from pathlib import Path

import pytest
import redis

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import Answers, ReceivedCall, answer_all
from tests.support.processes import ROOT, cache_proxy
from tests.support.redis_server import RedisServer, wait_for
from tests.support.store_checks import has_stored_answers

_prefixes = (f"versions{number}" for number in count())


@pytest.fixture
def flags(shared_redis: str) -> tuple[str, ...]:
    """Return the flags of a deployment for this test only."""
    return ("--cache-url", shared_redis, "--key-prefix", next(_prefixes), *UNLIMITED_RATE_FLAGS)


def _answer_next_levels(call: ReceivedCall) -> Answers:
    """Answer as a new model would: each level is another one than before."""
    return [(uuid, level % 7 + 1) for uuid, level in answer_all(call)]


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
    wait_for(lambda: has_stored_answers(old.proxy), description="the answers are stored")
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
    wait_for(lambda: has_stored_answers(right.proxy), description="the answers are stored")
    right.proxy.stop()
    _age(own_redis, days=31)
    right = stage_with(*flags, model=right.model)
    right.caller.infer(fresh)
    wait_for(lambda: has_stored_answers(right.proxy), description="the answers are stored")
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
