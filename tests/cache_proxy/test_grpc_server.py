"""A gRPC server that ends is heard of."""

import asyncio

import pytest
from grpc import aio

from services.cache_proxy.grpc_server import GrpcServer
from services.cache_proxy.health import Health
from services.common.endings import end
from tests.support.hostile import grpc_message, peer


async def _started() -> tuple[GrpcServer, str]:
    """With gRPC's own loop, which a name that is not UTF-8 ends (see known_methods.py)."""
    server = aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    front = GrpcServer(server, Health(), [], [])
    await front.start()
    return front, f"127.0.0.1:{port}"


def _break(target: str) -> None:
    with peer(target) as hostile:
        stream = hostile.headers(path=b"/S\xff/\xfe")
        hostile.send(stream, grpc_message(b""))
        hostile.read(1)


async def test_a_server_that_ended_by_itself_says_of_what() -> None:
    """Else the process would go on without it, and look healthy."""
    front, target = await _started()
    ended = asyncio.create_task(front.ended())
    await asyncio.to_thread(_break, target)
    with pytest.raises(UnicodeDecodeError):
        await asyncio.wait_for(ended, 30)
    await front.server.stop(0)


async def test_a_server_that_is_stopped_ends_without_a_word() -> None:
    """As at every SIGTERM."""
    front, _ = await _started()
    ended = asyncio.create_task(front.ended())
    await front.server.stop(0)
    await asyncio.wait_for(ended, 30)


async def test_who_waits_no_longer_leaves_a_server_that_can_be_stopped() -> None:
    """As where the proxy ends by a failure."""
    front, _ = await _started()
    ended = asyncio.create_task(front.ended())
    await asyncio.sleep(0)
    await end([ended])
    await asyncio.wait_for(front.server.stop(0), 30)
