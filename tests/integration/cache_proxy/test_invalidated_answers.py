"""Invalidated answers, as callers of proxies see them."""

from itertools import count
from pathlib import Path

import pytest

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, read_metrics
from tests.support.faulty_link import faulty_link
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_level
from tests.support.processes import run_command
from tests.support.redis_server import RedisServer, wait_for
from tests.support.store_checks import has_stored_answers

_prefixes = (f"invalidation{number}" for number in count())


@pytest.fixture
def flags(shared_redis: str) -> tuple[str, ...]:
    """Return the flags of a deployment for this test only."""
    return ("--cache-url", shared_redis, "--key-prefix", next(_prefixes), *UNLIMITED_RATE_FLAGS)


def _answer_next_levels(call: ReceivedCall) -> Answers:
    """Answer as a new model would: each level is another one than before."""
    return [(uuid, level % 7 + 1) for uuid, level in answer_all(call)]


def _invalidate(flags: tuple[str, ...], *selection: str) -> str:
    finished = run_command("services.cache_proxy", "invalidate", *selection, *flags[:4])
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


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
        wait_for(
            lambda: has_stored_answers(stage.proxy),
            description="the key schema and the first answer are stored",
        )
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
    wait_for(
        lambda: has_stored_answers(stage.proxy), description="the key schema and the first answer are stored"
    )

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
