"""A gRPC server that ends by itself is started again in place; one that is closed ends."""

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

from services.cache_proxy.config.settings import ServerSettings
from services.cache_proxy.rpc.health import Health
from services.cache_proxy.rpc.server import GrpcServer, Listeners
from services.common.errors import CommandError
from services.common.tasks import cancel_and_wait
from tests.support.http2_peer import frame_grpc_message, open_peer


def _public(health: Health) -> aio.Server:
    """GRPC's own, whose loop a name that is not UTF-8 ends (see known_methods.py)."""
    server = aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    return server


@asynccontextmanager
async def _started(*listen: str) -> AsyncIterator[GrpcServer]:
    health = Health()
    settings = ServerSettings(listen=listen)
    server = GrpcServer(lambda: _public(health), listeners=Listeners(settings, None), health=health)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def _break(target: str) -> None:
    with open_peer(target) as hostile:
        stream = hostile.send_headers(path=b"/S\xff/\xfe")
        hostile.send_data(stream, frame_grpc_message(b""))
        hostile.receive(1)


async def _is_serving(target: str) -> bool:
    async with aio.insecure_channel(target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        check: Any = health_pb2_grpc.HealthStub(channel)
        answer = await check.Check(health_pb2.HealthCheckRequest(), timeout=30, wait_for_ready=True)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_a_server_that_ended_by_itself_is_started_again_on_its_addresses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TCP and Unix sockets, as often as it ends, each end logged once."""
    async with _started("127.0.0.1:0", f"unix:{tmp_path}/s") as server:
        await server.set_serving()
        tcp, unix = server.addresses
        running = asyncio.create_task(server.run())
        for times in (1, 2):
            await asyncio.to_thread(_break, tcp)
            async with asyncio.timeout(30):
                while sum("started again" in one.getMessage() for one in caplog.records) < times:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await _is_serving(tcp)
            assert await _is_serving(unix)
        assert server.addresses == [tcp, unix]
        assert not running.done()
        await server.close()
        await asyncio.wait_for(running, 30)


async def test_a_server_whose_address_is_gone_ends_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the process would go on without it, and look healthy."""
    caplog.set_level(logging.CRITICAL)
    async with _started("127.0.0.1:0") as server:
        [target] = server.addresses
        host, _, port = target.rpartition(":")
        make = server._make_server

        def make_late() -> aio.Server:
            taken.bind((host, int(port)))
            taken.listen()
            return make()

        with socket.socket() as taken:
            monkeypatch.setattr(server, "_make_server", make_late)
            running = asyncio.create_task(server.run())
            await asyncio.to_thread(_break, target)
            with pytest.raises(CommandError, match=f"--listen {target}: port {port} is taken"):
                await asyncio.wait_for(running, 30)


async def test_a_server_that_is_closed_ends_without_an_error() -> None:
    """As at every SIGTERM."""
    async with _started("127.0.0.1:0") as server:
        running = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        await server.close()
        await asyncio.wait_for(running, 30)


async def test_cancelling_the_wait_leaves_a_server_that_can_be_closed() -> None:
    """As where the proxy ends by a failure."""
    async with _started("127.0.0.1:0") as server:
        running = asyncio.create_task(server.run())
        await asyncio.sleep(0)
        await cancel_and_wait([running])
        await asyncio.wait_for(server.close(), 30)
