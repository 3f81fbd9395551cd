"""A server that moves to another address is reached within seconds of the change in DNS."""

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

_OLD_ADDRESS = "127.0.0.2"
_NEW_ADDRESS = "127.0.0.3"
_MAX_SECONDS = 5
_UNREACHABLE_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
_REQUEST = pb.SeniorityRequestBatch(batch=[pb.SeniorityRequest(uuid=1, company="c", title="t")])


@contextmanager
def _silent_listener(port: int) -> Iterator[None]:
    """Neither accept nor refuse connections at the old address, as if its machine were down."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_OLD_ADDRESS, port))
        listener.listen(0)
        # Fill the accept queue.
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((_OLD_ADDRESS, port))
        yield


async def _gets_response(channel: ReloadingChannel) -> bool:
    # The proxy does this every second, the augmenter before each RPC.
    channel.refresh()
    try:
        await seniority_pb2_grpc.SeniorityModelStub(channel.current).InferSeniority(_REQUEST, timeout=10)
    except aio.AioRpcError as error:
        if error.code() not in _UNREACHABLE_CODES:
            raise
        return False
    return True


async def _seconds_to_reach(
    open_channel_to: Callable[[str], ReloadingChannel],
    *,
    change_after_seconds: float,
    meanwhile: str | None,
    old: Callable[[int], AbstractContextManager[None]],
) -> float:
    """Return the seconds from the change in DNS to the first response.

    Until then the name has the address `meanwhile`, and `old` occupies the old address.
    """
    port = free_port()
    with dns_server(_OLD_ADDRESS) as dns, scripted_model(address=f"{_NEW_ADDRESS}:{port}"):
        async with open_channel_to(dns.grpc_target(port)) as channel:
            with scripted_model(address=f"{_OLD_ADDRESS}:{port}"):
                assert await _gets_response(channel)
            dns.address = meanwhile
            with old(port):
                change = asyncio.create_task(_change(dns, after_seconds=change_after_seconds))
                while not await _gets_response(channel):  # noqa: ASYNC110
                    await asyncio.sleep(1)
                return time.monotonic() - await change


async def _change(dns: DnsServer, *, after_seconds: float) -> float:
    await asyncio.sleep(after_seconds)
    dns.address = _NEW_ADDRESS
    return time.monotonic()


def _no_listener(_port: int) -> AbstractContextManager[None]:
    return nullcontext()


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("opened", [open_channel, open_model_channel], ids=["augmenter", "model"])
async def test_server_at_a_new_address_is_reached(opened: Callable[[str], ReloadingChannel]) -> None:
    """The old address refuses connections, or is silent, or the name does not exist for 15 s."""
    seconds = await asyncio.gather(
        _seconds_to_reach(opened, change_after_seconds=2, meanwhile=_OLD_ADDRESS, old=_no_listener),
        _seconds_to_reach(opened, change_after_seconds=4, meanwhile=_OLD_ADDRESS, old=_silent_listener),
        _seconds_to_reach(opened, change_after_seconds=15, meanwhile=None, old=_no_listener),
    )
    assert max(seconds) < _MAX_SECONDS, seconds


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize(
    ("change_after_seconds", "meanwhile"),
    [(1, _OLD_ADDRESS), (12, None)],
    ids=["at once", "unnamed for 12 s"],
)
def test_callers_get_answers_soon_after_the_model_has_moved(
    change_after_seconds: float, meanwhile: str | None
) -> None:
    """A caller that retries has its answer within seconds of the change."""
    port = free_port()
    with ExitStack() as stack:
        dns = stack.enter_context(dns_server(_OLD_ADDRESS))
        with scripted_model(address=f"{_OLD_ADDRESS}:{port}"):
            proxy = stack.enter_context(
                cache_proxy(
                    "--model-target", dns.grpc_target(port), "--cache-url", "memory:", *UNLIMITED_RATE_FLAGS
                )
            )
            caller = stack.enter_context(open_caller(proxy.target))
            assert caller.infer([("before", "t")]).code is grpc.StatusCode.OK
        stack.enter_context(scripted_model(address=f"{_NEW_ADDRESS}:{port}"))
        dns.address = meanwhile
        change_at = time.monotonic() + change_after_seconds
        number = 0
        while time.monotonic() < change_at:
            number += 1
            caller.infer([("meanwhile", str(number))], timeout_seconds=1)
        dns.address = _NEW_ADDRESS
        changed_at = time.monotonic()
        while caller.infer([("after", "t")], timeout_seconds=10).code is not grpc.StatusCode.OK:
            time.sleep(0.2)
        assert time.monotonic() - changed_at < _MAX_SECONDS
