"""Channels to this machine, in an environment that names an HTTP proxy."""

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from grpc import aio

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc
from services.cache_proxy.commands import infer
from services.cache_proxy.commands.infer import InferSettings
from services.common.errors import UsageError
from services.common.grpc_target import check_target, http_proxy_options, is_local_target
from services.common.reloading_channel import ReloadingChannel
from tests.support.model_server import answer_all, scripted_model
from tests.support.processes import run_command

_NOTHING = pb.SeniorityRequestBatch()
_NO_PROXY = [("grpc.enable_http_proxy", 0)]


@pytest.fixture
def http_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Name an HTTP proxy in the environment that refuses everything; what it was requests."""
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    requests.append(connection.recv(1000).partition(b"\r\n")[0])
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=serve, daemon=True).start()
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.getsockname()[1]}")
    yield requests
    listener.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "dns:///localhost", "ipv4:127.0.0.1"])
async def test_channel_to_loopback_avoids_the_http_proxy(http_proxy: list[bytes], host: str) -> None:
    """The augmenter's and the proxy's channels connect directly."""
    with scripted_model(answer_all) as model:
        target = f"{host}:{model.target.rpartition(':')[2]}"
        async with ReloadingChannel(target, tls=None, options=[], max_call_seconds=0) as channel:
            stub = seniority_pb2_grpc.SeniorityModelStub(channel.current)
            assert await stub.InferSeniority(_NOTHING, timeout=20) == pb.SeniorityResponseBatch()
    assert http_proxy == []


def test_infer_avoids_the_http_proxy(http_proxy: list[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    """So does the command for people."""
    with scripted_model(answer_all) as model:
        infer.run(InferSettings(target=model.target, company="Acme", title="Clerk", deadline_seconds=20))
    assert (capsys.readouterr().out != "", http_proxy) == (True, [])


async def test_channel_to_another_machine_uses_the_http_proxy(
    http_proxy: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """A target elsewhere may be out of reach without it; one line says so, without the proxy's URL."""
    caplog.set_level("INFO")
    options = [("grpc.initial_reconnect_backoff_ms", 100)]
    async with ReloadingChannel("192.0.2.1:50051", tls=None, options=options, max_call_seconds=0) as channel:
        with pytest.raises(aio.AioRpcError, match="UNAVAILABLE"):
            await seniority_pb2_grpc.SeniorityModelStub(channel.current).InferSeniority(_NOTHING, timeout=20)
    [message] = caplog.messages
    assert message.startswith("grpc_proxy is set: calls to 192.0.2.1:50051 go through that proxy, unless")
    assert http_proxy[0] == b"CONNECT 192.0.2.1:50051 HTTP/1.1"


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (f"unix:{Path('/run/proxy.sock')}", _NO_PROXY),
        ("[::1]:50051", _NO_PROXY),
        ("ipv6:[::1]:50051", _NO_PROXY),
        ("dns:LOCALHOST:50051", _NO_PROXY),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", _NO_PROXY),
        ("ipv4:127.0.0.1:1,10.0.0.2:2", []),
        ("localhost.example.com:50051", []),
        ("cache-proxy:50051", []),
    ],
)
def test_only_this_machine_is_kept_from_the_http_proxy(target: str, options: list[object]) -> None:
    """By what the target says, without a name resolution."""
    assert http_proxy_options(target) == options


@pytest.mark.parametrize(
    "target",
    [
        "model:50051",
        "model.example.:1",
        "a_b-c:65535",
        "127.0.0.1:1",
        "[::1]:50051",
        "[fe80::1%25eth0]:1",
        "dns:model:1",
        "dns:///model:1",
        "dns://10.0.0.53/model:1",
        "dns://10.0.0.53:53/model:1",
        "dns:///[::1]:1",
        "DNS:///model:1",
        "ipv4:10.0.0.1:1",
        "ipv4:10.0.0.1:1,10.0.0.2:2",
        "ipv4:///10.0.0.1:1",
        "ipv6:[::1]:1",
        "ipv6:[::1]:1,[::2]:2",
        "unix:path",
        "unix:/run/s",
        "unix:///run/s",
        "unix-abstract:name",
        "xds:///model",
        "xds://authority/model",
        "google-c2p:///model",
        "http:1",
        "localhost:443",
    ],
)
def test_target_that_grpc_understands_is_accepted(target: str) -> None:
    """Every resolver of the core."""
    check_target(target, flag_name="--target", tls_flag="--tls-ca")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        *((f"{scheme}://model:50051", "not a URL") for scheme in ("http", "grpc", "tcp", "h2c", "HTTP")),
        ("https://model:50051", "--tls-ca encrypts"),
        ("grpcs://model", "--tls-ca encrypts"),
        *(
            (f"{prefix}{host}", "has no port")
            for prefix in ("", "dns:", "dns:///", "dns://server/", "ipv4:")
            for host in ("model", "10.0.0.1")
        ),
        ("[::1]", "has no port"),
        ("::1", "in brackets"),
        ("::1:50051", "in brackets"),
        ("ipv6:::1", "in brackets"),
        ("[model]:1", "not an IPv6 address"),
        ("ipv4:model:1", "must be an IPv4 address"),
        ("ipv4:[::1]:1", "must be an IPv4 address"),
        ("ipv6:10.0.0.1:1", "must be an IPv6 address"),
        ("ipv4:10.0.0.1:1,10.0.0.2", "has no port"),
        ("a:1,b:2", "several addresses"),
        ("model:0", "from 1 to 65535"),
        ("model:65536", "from 1 to 65535"),
        ("model:", "must be HOST:PORT"),
        (":50051", "must be HOST:PORT"),
        ("model:http", "must be HOST:PORT"),
        ("model:50051/path", "must be HOST:PORT"),
        ("model:50051 ", "must be HOST:PORT"),
        (" model:50051", "must be HOST:PORT"),
        ("model:50\u0665", "must be HOST:PORT"),
        ("unix:", "no socket"),
        ("unix://", "no socket"),
        ("unix://run/s", "must begin with /"),
        ("unix-abstract:", "no socket"),
        ("xds:///", "no service"),
        ("", "must be HOST:PORT"),
    ],
)
def test_target_that_grpc_would_misread_is_refused(target: str, words: str) -> None:
    """One line names the flag, the value and what to write."""
    with pytest.raises(UsageError) as refused:
        check_target(target, flag_name="--target", tls_flag="--tls-ca")
    line = str(refused.value)
    assert line.startswith(f"--target {target!r}: ")
    assert words in line
    assert "\n" not in line


@pytest.mark.parametrize(
    "target", ["http://user:hunter2@model:1", "user:hunter2@model:1", "dns:///u:hunter2@m:1"]
)
def test_target_with_a_login_is_refused_without_showing_it(target: str) -> None:
    """GRPC knows no login in a target."""
    with pytest.raises(UsageError) as refused:
        check_target(target, flag_name="--target", tls_flag="--tls-ca")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("program", "args", "flag"),
    [
        ("cache_proxy", ("serve", "--cache-url", "memory:"), "--model-target"),
        ("cache_proxy", ("infer",), "--target"),
        ("augmenter", ("run", "in", "out"), "--target"),
    ],
)
@pytest.mark.parametrize("target", ["http://model:50051", "model"])
def test_command_refuses_a_target_that_is_a_url_or_has_no_port(
    program: str, args: tuple[str, ...], flag: str, target: str
) -> None:
    """Exit code 2 and one line."""
    ended = run_command(f"services.{program}", *args, flag, target)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert f"{flag} {target!r}: " in ended.stderr


@pytest.mark.parametrize(
    ("target", "is_local"),
    [
        ("localhost:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("unix:/run/proxy.sock", True),
        ("unix-abstract:proxy", True),
        ("dns:///localhost:1", True),
        ("dns:localhost:1", True),
        ("dns://10.0.0.1/localhost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("localhost.example:1", False),
        ("127.0.0.1.example:1", False),
        ("10.0.0.1:1", False),
        ("0.0.0.0:1", False),
        ("proxy", False),
        ("xds:///localhost:1", False),
    ],
)
def test_local_targets_are_recognised(target: str, is_local: bool) -> None:
    """A target is local only if all of its addresses are, however it is written."""
    assert is_local_target(target) is is_local
