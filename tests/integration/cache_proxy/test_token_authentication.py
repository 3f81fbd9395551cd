"""Authentication of callers by bearer token, on a plaintext connection."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, ProxyEnvironment
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.caller_tokens import CALLER_TOKENS, bearer_metadata, caller_list_line
from tests.support.http2_peer import grpc_statuses, open_peer
from tests.support.model_server import scripted_model
from tests.support.processes import cache_proxy
from tests.support.redis_server import wait_for


@pytest.fixture(scope="module")
def by_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxyEnvironment]:
    """Start a plaintext proxy that admits callers by token, with its log level at debug."""
    caller_list = tmp_path_factory.mktemp("tokens") / "callers"
    caller_list.write_text(caller_list_line("pricing") + caller_list_line("gone") + "gone denied\n")
    with (
        scripted_model() as model,
        cache_proxy(
            "--model-target",
            model.target,
            "--cache-url",
            "memory:",
            *UNLIMITED_RATE_FLAGS,
            "--caller-tokens-file",
            str(caller_list),
            "--log-level",
            "debug",
        ) as proxy,
        open_caller(proxy.target) as client,
    ):
        yield ProxyEnvironment(client, proxy, model)


def test_caller_without_token_gets_no_cached_level_either(by_token: ProxyEnvironment) -> None:
    """For one pair or several, cached or new: `UNAUTHENTICATED`, no pair counted, no call to the model."""
    known = make_pairs("known", 2)
    assert by_token.caller.infer(known, metadata=bearer_metadata("pricing")).levels
    before, calls = read_metrics(by_token.proxy.http_url), len(by_token.model.calls)
    for pairs in (known[:1], known, make_pairs("new", 3), []):
        for metadata in ([], [("x-caller", "pricing")], bearer_metadata("unknown")):
            reply = by_token.caller.infer(pairs, metadata=metadata)
            assert reply.code is StatusCode.UNAUTHENTICATED
            assert reply.trailers.keys() == set()
            assert not any(token in reply.message for token in CALLER_TOKENS.values())
    after = read_metrics(by_token.proxy.http_url)
    changed = {
        name[1:]: after[name] - before[name]
        for name in after
        if name[0] in {"cache_proxy_requests_total", "cache_proxy_pairs_total"}
        and after[name] != before[name]
    }
    assert changed == {("UNAUTHENTICATED",): 12}
    assert len(by_token.model.calls) == calls


def test_denied_caller_gets_permission_denied_with_its_name(by_token: ProxyEnvironment) -> None:
    """The name is the one that the token identifies."""
    reply = by_token.caller.infer(make_pairs("denied", 1), metadata=bearer_metadata("gone"))
    assert (reply.code, reply.message) == (StatusCode.PERMISSION_DENIED, "gone may not call this proxy")


def test_caller_is_counted_under_the_name_of_its_token(by_token: ProxyEnvironment) -> None:
    """The name in `x-caller` is ignored."""
    pairs = make_pairs("name", 3)
    metadata = [*bearer_metadata("pricing"), ("x-caller", "somebody-else")]
    before = read_metrics(by_token.proxy.http_url).get(
        ("cache_proxy_caller_pairs_total", "pricing", "miss"), 0
    )
    assert by_token.caller.infer(pairs, metadata=metadata).misses == 3
    after = read_metrics(by_token.proxy.http_url)
    assert after["cache_proxy_caller_pairs_total", "pricing", "miss"] == before + 3
    assert not [name for name in after if "somebody-else" in name]


def test_health_and_reflection_need_no_token(by_token: ProxyEnvironment) -> None:
    """Any caller may check the health and read the public protos."""
    channel = by_token.caller.channel
    health_stub: Any = health_pb2_grpc.HealthStub(channel)
    reflection_stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    health = health_stub.Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    answers = reflection_stub.ServerReflectionInfo(iter([listing]), timeout=60)
    assert "SeniorityModel" in {one.name for one in next(answers).list_services_response.service}


def test_tokens_are_in_no_log_metric_or_process_listing(by_token: ProxyEnvironment) -> None:
    """Also at log level debug."""
    for name, token in CALLER_TOKENS.items():
        by_token.caller.infer(make_pairs("seen", 1), metadata=bearer_metadata(name))
        with open_peer(by_token.proxy.target) as odd:
            odd.send_request(b"", [("authorization", f"Bearer {token}".encode() + b"\xff")])
            wait_for(lambda: odd.receive(1) and grpc_statuses(odd), description="it is answered")
    process = Path("/proc") / str(by_token.proxy.process.pid)
    text = by_token.proxy.log + str(read_metrics(by_token.proxy.http_url))
    text += "".join((process / file).read_text() for file in ("cmdline", "environ"))
    assert not [token for token in CALLER_TOKENS.values() if token in text]
