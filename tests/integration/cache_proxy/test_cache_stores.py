"""The proxy with each kind of store: shared, after restarts, unavailable, slow and embedded."""

import threading
from pathlib import Path

import pytest
import redis
from grpc import StatusCode

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import scripted_level, scripted_model
from tests.support.processes import cache_proxy
from tests.support.redis_server import RedisServer, wait_for
from tests.support.store_checks import has_stored_answers, infer_new_pairs, is_store_up

# For tests of the content of Redis: a busy machine must not make Redis count as lost.
LONG_TIMEOUT_FLAGS = ("--cache-timeout", "10s")


def test_proxies_on_one_redis_share_answers_of_one_model_version(
    stage_with: StartProxyEnvironment, shared_redis: str
) -> None:
    """A second proxy finds the answers of the first; one with another model version does not."""
    flags = (
        "--cache-url",
        shared_redis,
        "--key-prefix",
        "shared",
        *UNLIMITED_RATE_FLAGS,
        *LONG_TIMEOUT_FLAGS,
    )
    pairs = make_pairs("shared", 30)
    first = stage_with(*flags)
    assert first.caller.infer(pairs).misses == 30
    wait_for(lambda: has_stored_answers(first.proxy), description="the answers are stored")
    second = stage_with(*flags, "--model-version", "1", model=first.model)
    assert second.caller.infer(pairs).hits == 30
    samples = read_metrics(second.proxy.http_url)
    assert samples["cache_proxy_pairs_total", "l2"] == 30
    assert samples["cache_proxy_store_duration_seconds_count", "get"] >= 1
    other = stage_with(*flags, "--model-version", "2", model=first.model)
    assert other.caller.infer(pairs).misses == 30


@pytest.mark.slow
@pytest.mark.alone
def test_callers_are_answered_during_every_outage_of_redis(
    stage_with: StartProxyEnvironment, own_redis: RedisServer
) -> None:
    """Redis is down at the start, killed under load and paused; each time it comes back.

    Callers are always answered in time, each change is logged once, and the answers of the outages are stored
    afterwards.
    """
    own_redis.kill()
    stage = stage_with("--cache-url", own_redis.url, "--cache-timeout", "1s", *UNLIMITED_RATE_FLAGS)
    infer_new_pairs(stage.caller, "down at start")
    own_redis.start()
    wait_for(lambda: is_store_up(stage.proxy), description="the store is back")

    stop = threading.Event()
    failed = []

    def load(name: str) -> None:
        with open_caller(stage.proxy.target) as caller:
            number = 0
            while not stop.is_set():
                number += 1
                result = caller.infer(make_pairs(f"load {name} {number}", 5), timeout_seconds=30)
                if result.code is not StatusCode.OK:
                    failed.append(result)

    threads = [threading.Thread(target=load, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    own_redis.kill()
    wait_for(lambda: not is_store_up(stage.proxy), description="the loss is noticed")
    infer_new_pairs(stage.caller, "while killed")
    own_redis.start()
    wait_for(lambda: is_store_up(stage.proxy), description="the store is back again")
    own_redis.pause()
    # Store and queue each wait for a timeout.
    assert infer_new_pairs(stage.caller, "while paused") < 15
    wait_for(lambda: not is_store_up(stage.proxy), description="the pause is noticed")
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failed
    seconds = infer_new_pairs(stage.caller, "while down") + infer_new_pairs(stage.caller, "while still down")
    # A second wait for the silent server would take two more timeouts.
    assert seconds < 2
    own_redis.resume()
    wait_for(lambda: is_store_up(stage.proxy), description="the store is back a third time")
    assert stage.proxy.stop() == 0
    assert stage.proxy.log.count("the store is down") == 3
    assert stage.proxy.log.count("the store is back") == 3
    assert "Traceback" not in stage.proxy.log
    with (
        cache_proxy(
            "--model-target", "127.0.0.1:1", "--cache-url", own_redis.url, *LONG_TIMEOUT_FLAGS
        ) as other,
        open_caller(other.target) as caller,
    ):
        for company in ("down at start", "while killed", "while paused", "while down", "while still down"):
            assert caller.infer(make_pairs(company, 20)).hits == 20


@pytest.mark.slow
def test_key_secret_separates_answers(
    stage_with: StartProxyEnvironment, shared_redis: str, tmp_path: Path
) -> None:
    """Answers are found only with the secret with which they were stored; it is never logged."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"hunter2\xff\n")
    flags = (
        "--cache-url",
        shared_redis,
        "--key-prefix",
        "secret",
        *UNLIMITED_RATE_FLAGS,
        *LONG_TIMEOUT_FLAGS,
    )
    plain = stage_with(*flags)
    pairs = make_pairs("secret", 5)
    plain.caller.infer(pairs)
    wait_for(lambda: has_stored_answers(plain.proxy), description="the answers are stored")
    for misses in (5, 0):
        keyed = stage_with(*flags, "--key-secret-file", str(secret), model=plain.model)
        assert keyed.caller.infer(pairs).misses == misses
        # After the stop, all answers and log lines are written.
        assert keyed.proxy.stop() == 0
        assert "hunter2" not in keyed.proxy.log


def test_normalize_exact_keeps_spellings_apart(stage_with: StartProxyEnvironment) -> None:
    """Each spelling is a separate pair and is inferred."""
    stage = stage_with("--normalize", "exact", *UNLIMITED_RATE_FLAGS)
    pairs = [("Exact", "T"), ("EXACT", "T"), ("Exact ", "T"), ("Exact", "t")]
    assert stage.caller.infer(pairs).levels == [scripted_level(*pair) for pair in pairs]
    assert len(stage.model.received_pairs()) == 4


@pytest.mark.slow
def test_wrong_password_makes_store_unavailable_and_is_not_shown(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    """Callers are answered; the log has one warning and no password."""
    with own_redis.client() as client:
        client.config_set("requirepass", "s3cret")
    path = tmp_path / "password"
    path.write_bytes(b"hunter2\xff\n")
    url = own_redis.url.replace("redis://", "redis://:hunter3@")
    file_flags = ("--cache-url", own_redis.url, "--cache-password-file", str(path))
    for flags, env in (((), {"CACHE_PROXY_CACHE_URL": url}), (file_flags, {})):
        with (
            scripted_model() as model,
            cache_proxy("--model-target", model.target, *flags, *UNLIMITED_RATE_FLAGS, env=env) as proxy,
            open_caller(proxy.target) as caller,
        ):
            assert caller.infer([("password", "t")]).code is StatusCode.OK
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
            *LONG_TIMEOUT_FLAGS,
        ) as proxy,
        open_caller(proxy.target) as caller,
    ):
        assert caller.infer([("password", "t")]).code is StatusCode.OK
        assert "s3cret" not in proxy.log
        assert is_store_up(proxy)
        with redis.Redis(port=own_redis.port, password="s3cret") as client:
            wait_for(lambda: any(b":c2:" in key for key in client.scan_iter()), description="it is written")


@pytest.mark.slow
def test_redis_that_may_evict_any_key_is_logged_once(own_redis: RedisServer) -> None:
    """One log line and a gauge show an unsafe policy; with a safe policy there is neither."""
    for policy, evicts in (("allkeys-lru", 1), ("volatile-lru", 0), ("noeviction", 0)):
        with own_redis.client() as client:
            client.config_set("maxmemory-policy", policy)
        with cache_proxy("--model-target", "127.0.0.1:1", "--cache-url", own_redis.url) as proxy:
            if evicts:
                wait_for(lambda: policy in proxy.log, description="the warning")  # noqa: B023 - called at once
            else:
                wait_for(
                    lambda: read_metrics(proxy.http_url)["cache_proxy_live_replicas",],
                    description="the replica is connected",
                )
            assert read_metrics(proxy.http_url)["cache_proxy_store_evicts",] == evicts
            assert proxy.log.count("maxmemory-policy") == evicts
