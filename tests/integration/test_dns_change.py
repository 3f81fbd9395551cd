"""A server that moves to another address is found within seconds of the change in DNS."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import grpc
import pytest
from grpc import aio

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc
from services.augmenter.client.channel import open_channel
from services.cache_proxy.model.client import open_model_channel
from services.common.reloading_channel import ReloadingChannel
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS
from tests.support.caller import open_caller
from tests.support.dns_server import DnsServer, dns_server
from tests.support.model_server import scripted_model
from tests.support.processes import cache_proxy
from tests.support.redis_server import free_port

_OLD, _NEW = "127.0.0.2", "127.0.0.3"
_FOUND_WITHIN_SECONDS = 5
_NOT_REACHED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_REQUEST = pb.SeniorityRequestBatch(batch=[pb.SeniorityRequest(uuid=1, company="c", title="t")])


@contextmanager
def _silent_listener(port: int) -> Iterator[None]:
    """The old address takes no connection and refuses none, as that of a machine that is gone."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_OLD, port))
        listener.listen(0)
        for _ in range(4):  # more than its queue holds
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((_OLD, port))
        yield


async def _gets_response(channel: ReloadingChannel) -> bool:
    channel.refresh()  # as the proxy does every second, and the augmenter before every RPC
    try:
        await seniority_pb2_grpc.SeniorityModelStub(channel.current).InferSeniority(_REQUEST, timeout=10)
    except aio.AioRpcError as error:
        if error.code() not in _NOT_REACHED:
            raise
        return False
    return True


async def _seconds_to_find(
    opened: Callable[[str], ReloadingChannel],
    *,
    change_after_seconds: float,
    meanwhile: str | None,
    old: Callable[[int], AbstractContextManager[None]],
) -> float:
    """From the change in DNS to the first answer."""
    port = free_port()
    with dns_server(_OLD) as dns, scripted_model(address=f"{_NEW}:{port}"):
        async with opened(dns.grpc_target(port)) as channel:
            with scripted_model(address=f"{_OLD}:{port}"):
                assert await _gets_response(channel)
            dns.address = meanwhile
            with old(port):
                change = asyncio.create_task(_change(dns, after_seconds=change_after_seconds))
                while not await _gets_response(channel):  # noqa: ASYNC110 - every second, as the proxy looks
                    await asyncio.sleep(1)
                return time.monotonic() - await change


async def _change(dns: DnsServer, *, after_seconds: float) -> float:
    await asyncio.sleep(after_seconds)
    dns.address = _NEW
    return time.monotonic()


def _no_listener(_port: int) -> AbstractContextManager[None]:
    return nullcontext()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("opened", [open_channel, open_model_channel], ids=["augmenter", "model"])
async def test_a_server_that_moves_is_found(opened: Callable[[str], ReloadingChannel]) -> None:
    """Whether the old address refuses, says nothing, or has had no successor in DNS for 15 s."""
    took = await asyncio.gather(
        _seconds_to_find(opened, change_after_seconds=2, meanwhile=_OLD, old=_no_listener),
        _seconds_to_find(opened, change_after_seconds=4, meanwhile=_OLD, old=_silent_listener),
        _seconds_to_find(opened, change_after_seconds=15, meanwhile=None, old=_no_listener),
    )
    assert max(took) < _FOUND_WITHIN_SECONDS, took


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("change_after_seconds", "meanwhile"), [(1, _OLD), (12, None)], ids=["at once", "unnamed for 12 s"]
)
def test_callers_are_answered_soon_after_the_model_has_moved(
    change_after_seconds: float, meanwhile: str | None
) -> None:
    """A caller that comes back as the pushback says has its answer within seconds of the change."""
    port = free_port()
    with ExitStack() as stack:
        dns = stack.enter_context(dns_server(_OLD))
        with scripted_model(address=f"{_OLD}:{port}"):
            proxy = stack.enter_context(
                cache_proxy(
                    "--model-target", dns.grpc_target(port), "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS
                )
            )
            asking = stack.enter_context(open_caller(proxy.target))
            assert asking.infer([("before", "t")]).code is grpc.StatusCode.OK
        stack.enter_context(scripted_model(address=f"{_NEW}:{port}"))
        dns.address = meanwhile
        until = time.monotonic() + change_after_seconds
        number = 0
        while time.monotonic() < until:  # callers go on
            asking.infer([("meanwhile", str(number := number + 1))], timeout_seconds=1)
        dns.address = _NEW
        changed_at = time.monotonic()
        while asking.infer([("after", "t")], timeout_seconds=10).code is not grpc.StatusCode.OK:
            time.sleep(0.2)
        assert time.monotonic() - changed_at < _FOUND_WITHIN_SECONDS
