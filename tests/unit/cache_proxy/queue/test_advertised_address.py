"""Tests of the address under which other replicas reach this one."""

import asyncio
import socket
import threading
from typing import NoReturn

import pytest

from services.cache_proxy.queue.advertised_address import AdvertisedAddress


@pytest.mark.parametrize(
    ("http", "redis_url", "address"),
    [
        ("10.1.2.3:9464", "redis://192.0.2.1:6379/0", "10.1.2.3:9464"),
        ("127.0.0.1:9464", "redis://127.0.0.1:6379/0", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "redis://localhost/0", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "unix:///run/redis.sock", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "unix:///run/redis.sock", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis://127.0.0.1:6379/0", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "redis://192.0.2.1:6379/0", ""),
        ("localhost:9464", "redis://192.0.2.1:6379/0", ""),
        ("[::1]:9464", "redis://192.0.2.1:6379/0", ""),
        ("127.0.0.1:9464", "redis+cluster://127.0.0.1:7000,127.0.0.1:7001", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis+cluster://name:p%40ss@127.0.0.1:7000,127.0.0.1:7001", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis+cluster://nowhere.invalid:7000,127.0.0.1", "127.0.0.1:9464"),
        ("0.0.0.0:9464", "redis+sentinel://:p,w@127.0.0.1:26379,127.0.0.1/cache", "127.0.0.1:9464"),
        ("127.0.0.1:9464", "redis+sentinel://192.0.2.1:26379,192.0.2.2:26379/cache", ""),
    ],
)
async def test_loopback_address_is_advertised_only_where_redis_is_local(
    http: str, redis_url: str, address: str
) -> None:
    """From another machine, a loopback address would lead to another process."""
    assert await AdvertisedAddress(http_bound=http, redis_url=redis_url).find() == address


async def test_silent_name_server_delays_address_for_a_second_without_blocking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The event loop goes on meanwhile. Without an address, other replicas do not probe this one."""
    answer = threading.Event()

    def silent(*_: object, **__: object) -> NoReturn:
        answer.wait(30)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    looking = asyncio.create_task(
        AdvertisedAddress(http_bound="0.0.0.0:9464", redis_url="redis://silent.test:6379").find()
    )
    turns = 0
    while not looking.done():
        await asyncio.sleep(0.05)
        turns += 1
    answer.set()
    assert looking.result() == ""
    assert 1 < turns < 100
