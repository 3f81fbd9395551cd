"""All fields of all keys in Redis are overwritten while a replica runs and before another one starts."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
import redis

from services.model_stub.levels import infer_level
from tests.support.call_log import max_limit_excess_seconds
from tests.support.caller import open_caller, read_metrics
from tests.support.fleet import Fleet
from tests.support.processes import ServiceProcess, run_command

pytestmark = pytest.mark.slow

_REPLACED = "values in Redis that could not be read were replaced"
JUNK = {
    "text": b"garbage",
    "binary": b"\xff\xfe\x00\x80",
    "empty": b"",
    "nan": b"nan",
    "infinite": b"-inf",
    "negative": b"-1",
    "many digits": b"9" * 5000,
    "huge": b"1e308",
}


def _overwrite_all(client: "redis.Redis", prefix: str, junk: bytes) -> None:
    for key in _keys(client, prefix):
        kind = client.type(key)
        if kind == b"hash":
            for field in list(client.hkeys(key)):
                client.hset(key, field, junk)
        elif kind == b"zset":
            members: list[Any] = list(client.zrange(key, 0, -1))
            for member in members:
                client.zadd(key, {junk + member: -1e300})
        elif kind == b"list":
            for index in range(client.llen(key)):
                client.execute_command("LSET", key, index, junk)  # type: ignore[no-untyped-call]
        else:
            client.set(key, junk)


def _retype_all(client: "redis.Redis", prefix: str) -> None:
    for key in _keys(client, prefix):
        kind = client.type(key)
        client.delete(key)
        if kind == b"string":
            client.rpush(key, "x")
        else:
            client.set(key, b"\xc1 what is this")


def _keys(client: "redis.Redis", prefix: str) -> Iterator[Any]:
    return iter(list(client.scan_iter(f"*{prefix}*", count=1000)))


def _assert_answered(proxy: ServiceProcess, pairs: list[tuple[str, str]]) -> None:
    with open_caller(proxy.target) as caller:
        reply = caller.infer(pairs)
    assert reply.code is grpc.StatusCode.OK, reply.message
    assert reply.levels == [infer_level(*pair) for pair in pairs]


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
@pytest.mark.parametrize("kind", [*JUNK, "another type"])
def test_replicas_run_and_start_with_garbage_in_every_key(kind: str, fleet: Fleet) -> None:
    """The fleet and the new replica answer correctly, no process prints a traceback, and commands work."""
    unpaced = ("--model-calls-per-second", "0", "--model-rate", "1000000", "--linger", "1ms")
    old = fleet.start_replica(*unpaced)
    before = [("Before", f"Nurse {number}") for number in range(30)]
    after = [("After", f"Driver {number}") for number in range(30)]
    _assert_answered(old, before)
    with fleet.redis.client() as client:
        if kind in JUNK:
            _overwrite_all(client, fleet.key_prefix, JUNK[kind])
        else:
            _retype_all(client, fleet.key_prefix)
    new = fleet.start_replica(*unpaced)
    for proxy in (new, old):
        _assert_answered(proxy, before)
        _assert_answered(proxy, after)
    cache_flags = ("--cache-url", fleet.url, "--key-prefix", fleet.key_prefix)
    stats = run_command("services.cache_proxy", "stats", "--json", *cache_flags)
    assert stats.returncode == 0, stats.stderr
    assert json.loads(stats.stdout)["pairs"] >= 0
    got = run_command(
        "services.cache_proxy", "get", "--company", "After", "--title", "Driver 1", *cache_flags
    )
    assert got.returncode == 0, got.stderr
    invalidated = run_command(
        "services.cache_proxy", "invalidate", "--company", "After", "--title", "x", *cache_flags
    )
    assert invalidated.returncode == 0, invalidated.stderr
    for proxy in (old, new):
        with urlopen(f"{proxy.http_url}/status.json", timeout=10) as page:
            assert page.status == 200
    assert sum(read_metrics(proxy.http_url)["cache_proxy_store_garbage_total",] for proxy in (old, new)) > 0
    assert (old.stop(), new.stop()) == (0, 0)
    for text in (old.log, new.log, stats.stderr, got.stderr):
        assert "Traceback" not in text


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
def test_limit_holds_while_every_field_of_it_is_overwritten(fleet: Fleet) -> None:
    """Whatever values the fields have for a moment, the model gets no more calls than the settings allow."""
    flags = ("--model-calls-per-second", "4", "--model-batch-size", "10", "--linger", "1ms")
    proxies = fleet.start_replicas(2, *flags)
    with fleet.redis.client() as client:
        for number, junk in enumerate([*JUNK.values(), b"1e12"]):
            for proxy in proxies:
                _assert_answered(
                    proxy, [(f"{number} {proxy.target}", f"Nurse {index}") for index in range(10)]
                )
                for key in client.scan_iter(f"*{fleet.key_prefix}*:limit*"):
                    if client.type(key) == b"hash":
                        for field in list(client.hkeys(key)):
                            client.hset(key, field, junk)
    late_calls, _ = max_limit_excess_seconds(fleet.model_calls, pairs_per_second=1000, calls_per_second=4)
    assert late_calls < 0.05
    assert any(_REPLACED in proxy.log for proxy in proxies)
    for proxy in proxies:
        assert "Traceback" not in proxy.log
