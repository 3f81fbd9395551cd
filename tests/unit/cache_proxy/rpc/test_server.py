"""The gRPC server restarts on its addresses after a defect, and ends when it is closed."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cache_proxy.config.server_settings import ServerSettings
from services.cache_proxy.rpc.health import Health
from services.cache_proxy.rpc.server import GrpcServer, Listeners
from services.common.errors import CommandError
from services.common.tasks import cancel_and_wait
from tests.support.http2_peer import frame_grpc_message, open_peer


def _grpcio_server(health: Health) -> aio.Server:
    """Return grpcio's server, whose loop ends at a method name that is not UTF-8 (see unknown_methods.py)."""
    server = aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server


@asynccontextmanager
async def _running_server(*listen: str) -> AsyncIterator[GrpcServer]:
    health = Health()
    settings = ServerSettings(listen=listen)
    server = GrpcServer(lambda: _grpcio_server(health), listeners=Listeners(settings, None), health=health)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def _send_invalid_method_name(target: str) -> None:
    with open_peer(target) as hostile:
        stream = hostile.send_headers(path=b"/S\xff/\xfe")
        hostile.send_data(stream, frame_grpc_message(b""))
        hostile.receive(1)


async def _is_serving(target: str) -> bool:
    async with aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        check: Any = health_pb2_grpc.HealthStub(channel)
        answer = await check.Check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_server_that_ended_unexpectedly_restarts_on_the_same_addresses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On TCP and Unix sockets, as often as it ends. Each end is logged once."""
    async with _running_server("127.0.0.1:0", f"unix:{tmp_path}/s") as server:
        await server.set_serving()
        tcp, unix = server.addresses
        running = asyncio.create_task(server.run())
        for restarts in (1, 2):
            await asyncio.to_thread(_send_invalid_method_name, tcp)
            async with asyncio.timeout(30):
                while sum("started again" in one.getMessage() for one in caplog.records) < restarts:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await _is_serving(tcp)
            assert await _is_serving(unix)
        assert server.addresses == [tcp, unix]
        assert not running.done()
        await server.close()
        await asyncio.wait_for(running, 30)


async def test_restart_on_a_taken_address_raises_command_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise the process would continue without a server, and look healthy."""
    caplog.set_level(logging.CRITICAL)
    async with _running_server("127.0.0.1:0") as server:
        [target] = server.addresses
        host, _, port = target.rpartition(":")
        make = server._make_server

        def make_after_taking_port() -> aio.Server:
            blocker.bind((host, int(port)))
            blocker.listen()
            return make()

        with socket.socket() as blocker:
            monkeypatch.setattr(server, "_make_server", make_after_taking_port)
            running = asyncio.create_task(server.run())
            await asyncio.to_thread(_send_invalid_method_name, target)
            with pytest.raises(CommandError, match=f"--listen {target}: port {port} is taken"):
                await asyncio.wait_for(running, 30)


async def test_closed_server_returns_from_run_without_an_error() -> None:
    """This is what happens at every SIGTERM."""
    async with _running_server("127.0.0.1:0") as server:
        running = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        await server.close()
        await asyncio.wait_for(running, 30)


async def test_server_can_be_closed_after_run_was_cancelled() -> None:
    """This is what happens when the proxy ends because of a failure."""
    async with _running_server("127.0.0.1:0") as server:
        running = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        await cancel_and_wait([running])
        await asyncio.wait_for(server.close(), 30)
