"""Tests of probes of addresses that anyone with access to Redis may have written."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from services.cache_proxy.queue.peer_probe import REPLICA_ID_PATH, PeerProber

_ConnectionHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def _http_peer(talk: _ConnectionHandler) -> AsyncIterator[str]:
    """Run a server with this connection handler, and yield its address."""
    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        server.close()


@asynccontextmanager
async def _peer_prober() -> AsyncIterator[PeerProber]:
    """Open a prober without Redis, whose findings are examined before they are recorded."""
    prober = PeerProber(cast("Any", None))
    try:
        yield prober
    finally:
        await prober.close()


def _responding(
    head: bytes, seen: list[bytes], *, drip: bytes = b"", every_seconds: float = 0
) -> _ConnectionHandler:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(head)
        try:
            while drip:
                writer.write(drip)
                await writer.drain()
                await asyncio.sleep(every_seconds)
        except (ConnectionError, asyncio.CancelledError):
            pass
        writer.close()

    return talk


async def test_redirect_means_gone_and_is_not_followed() -> None:
    """The redirection's target receives no request."""
    seen: list[bytes] = []
    redirect = b"HTTP/1.1 302 Found\r\nlocation: http://%s/admin\r\ncontent-length: 0\r\n\r\n"
    async with _http_peer(_responding(b"", seen)) as victim:
        here: list[bytes] = []
        async with (
            _http_peer(_responding(redirect % victim.encode(), here)) as address,
            _peer_prober() as prober,
        ):
            assert await prober._probe_once("replica", address) == "gone"
        assert here[0].startswith(f"GET {REPLICA_ID_PATH} HTTP/1.1\r\n".encode())
    assert seen == []


@pytest.mark.parametrize(
    ("head", "drip", "every_seconds"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"x: y\r\n", 0.1),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n", b"", 0.1),
        (b"HTTP/1.1 200 OK\r\nx: ", b"y" * 65_536, 0),
    ],
    ids=["slow headers", "no body", "endless header"],
)
async def test_endless_response_is_abandoned(head: bytes, drip: bytes, every_seconds: float) -> None:
    """The probe ends after about a second, and does not take the replica for alive."""
    async with (
        _http_peer(_responding(head, [], drip=drip, every_seconds=every_seconds)) as address,
        _peer_prober() as prober,
    ):
        started_at = time.monotonic()
        assert await prober._probe_once("replica", address) != "alive"
        assert time.monotonic() - started_at < 10


async def test_only_start_of_body_is_read() -> None:
    """An endless body does not keep the probe busy."""
    talk = _responding(b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n", [], drip=b"y" * 65_536)
    async with _http_peer(talk) as address, _peer_prober() as prober:
        assert await prober._probe_once("replica", address) == "gone"


@pytest.mark.parametrize(
    "address",
    ["", "h", "h:", "u:pw@h:1", "h:1/admin?x=", "h:1#", "h:80\r\nx: y", "[::1", "h:123456", "http://h:1"],
)
async def test_invalid_address_is_not_probed(address: str) -> None:
    """No other path, credentials or header can be sent."""
    async with _peer_prober() as prober:
        prober.probe("replica", address)
        assert not prober._probes


async def test_concurrent_probes_are_bounded() -> None:
    """Redis may name a thousand replicas."""
    async with _peer_prober() as prober:
        for number in range(1000):
            prober.probe(f"replica {number}", "[::1]:9")
        assert len(prober._probes) == 16
