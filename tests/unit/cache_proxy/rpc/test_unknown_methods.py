"""A method name that is not UTF-8 is refused, or restarts the server, also with the newest grpcio."""

import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import h2.exceptions
import pytest
from grpc import StatusCode, aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from services.cache_proxy.rpc import unknown_methods
from tests.support.caller import open_caller
from tests.support.http2_peer import frame_grpc_message, grpc_statuses, open_peer
from tests.support.processes import ROOT, ServiceProcess, run_service
from tests.support.redis_server import wait_for

_SERVE = (
    "serve",
    "--model-target",
    "127.0.0.1:1",
    "--cache-url",
    "memory:",
    "--listen",
    "127.0.0.1:0",
    "--http-listen",
    "127.0.0.1:0",
    "--drain-delay",
    "0s",
)


def _is_refused(proxy: ServiceProcess) -> bool:
    """Return whether the RPC got a status. False means that the connection was closed after a GOAWAY."""
    with open_peer(proxy.target) as hostile, suppress(ConnectionError, h2.exceptions.ProtocolError):
        stream = hostile.send_headers(path=b"/S\xff/\xfe")
        hostile.send_data(stream, frame_grpc_message(b""))
        wait_for(lambda: hostile.receive(1) and grpc_statuses(hostile), description="an answer, or the end")
        return grpc_statuses(hostile) == {stream: StatusCode.UNIMPLEMENTED.value[0]}
    return False


def _is_serving(proxy: ServiceProcess) -> bool:
    with open_caller(proxy.target) as client:
        return client.infer([], timeout_seconds=10).code is StatusCode.OK


@pytest.mark.slow
def test_newest_grpcio_keeps_serving_after_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    """The newest release is installed from the index, beside the locked one."""
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--disable-pip-version-check",
        "--target",
        str(tmp_path),
        "grpcio",
    ]
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"grpcio cannot be installed from an index: {installed.stderr[-200:]}")
    with run_service("services.cache_proxy", *_SERVE, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as proxy:
        is_expected = "is not known inside" not in proxy.log
        for _ in range(3):
            assert _is_refused(proxy) is is_expected
            wait_for(lambda: _is_serving(proxy), description="it serves again")
        assert ("is started again" in proxy.log) is not is_expected
        assert proxy.stop() == 0


_UNEXPECTED_GRPCIO = """
import os
os.environ["GRPC_VERBOSITY"] = "NONE"
from services.cache_proxy.rpc import unknown_methods

def fail():
    raise AttributeError

unknown_methods._guarded_server_class = fail
"""


@pytest.mark.slow
def test_unexpected_grpcio_restarts_the_server_and_warns_once(tmp_path: Path) -> None:
    """The server restarts each time on the same port. The reason is logged once."""
    (tmp_path / "sitecustomize.py").write_text(_UNEXPECTED_GRPCIO)
    with run_service("services.cache_proxy", *_SERVE, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as proxy:
        for _ in range(3):
            assert not _is_refused(proxy)
            wait_for(lambda: _is_serving(proxy), description="it serves again")
        assert proxy.log.count("is not known inside") == 1
        assert proxy.log.count("is started again") == 3
        assert proxy.stop() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.delattr(cygrpc, "_ServicerContext"),
        lambda patch: patch.delattr(cygrpc, "ExecuteBatchError"),
        lambda patch: patch.setattr(cygrpc, "AioServer", object),
        lambda patch: patch.setattr(cygrpc, "AioServer", _UnexpectedServer),
    ],
)
async def test_unexpected_grpcio_keeps_the_public_server(
    change: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One warning is logged, and the server is grpcio's."""
    caplog.set_level(logging.WARNING)
    server = aio.server()
    monkeypatch.setattr(aio, "server", lambda **_: server)
    change(monkeypatch)
    unknown_methods._guarded_server_class.cache_clear()
    unknown_methods._warn_once.cache_clear()
    inner_server = server._server  # type: ignore[attr-defined]
    try:
        assert unknown_methods.create_server([]) is server
    finally:
        unknown_methods._guarded_server_class.cache_clear()
    assert server._server is inner_server  # type: ignore[attr-defined]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    await server.stop(0)


class _UnexpectedServer:
    """A server class with other arguments than expected."""

    def __init__(self, *, other: object) -> None:
        del other

    async def _request_call(self) -> None: ...
