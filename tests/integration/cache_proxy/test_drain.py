"""Draining under load: callers get answers, then UNAVAILABLE, and no other status."""

import asyncio
import signal
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc
from tests.integration.cache_proxy.conftest import UNLIMITED_RATE_FLAGS, StartProxyEnvironment
from tests.support.processes import ServiceProcess

_WORKERS = 64
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


def _request(company: str, title: str) -> pb.SeniorityRequestBatch:
    return pb.SeniorityRequestBatch(batch=[pb.SeniorityRequest(uuid=1, company=company, title=title)])


class _DrainLoad:
    """Workers that ignore every pushback.

    State: `seen`, RPCs by status and whether they had a pushback.
    """

    def __init__(self, target: str, stack: AsyncExitStack) -> None:
        self._target = target
        self._stack = stack
        self._shared: aio.Channel | None = None
        self.seen: Counter[tuple[StatusCode, bool]] = Counter()
        self.is_loaded = asyncio.Event()

    async def open_channel(self, *, shared: bool) -> aio.Channel:
        """Return the shared channel, or a new one."""
        if shared and self._shared is not None:
            return self._shared
        opened = await self._stack.enter_async_context(aio.insecure_channel(self._target, options=_OPTIONS))
        self._shared = opened if shared else self._shared
        return opened

    async def work(self, number: int) -> None:
        """Send one RPC after the other, with cached and new pairs in turn, until the connection is closed."""
        open_channel = await self.open_channel(shared=number % 2 == 0)
        model = seniority_pb2_grpc.SeniorityModelStub(open_channel)
        for count in range(1_000_000):
            request = _request(f"drain {number}", str(count if count % 2 else 0))
            try:
                await model.InferSeniority(request, timeout=20)
            except aio.AioRpcError as error:
                has_pushback = "grpc-retry-pushback-ms" in dict(error.trailing_metadata() or ())
                self.seen[error.code(), has_pushback] += 1
                if not has_pushback:
                    return
            else:
                self.seen[StatusCode.OK, False] += 1
                if self.seen[StatusCode.OK, False] == 10 * _WORKERS:
                    self.is_loaded.set()

    async def watch_health(self) -> None:
        """Watch health as a load-balancing channel does, on a connection that has no end of its own."""
        health = health_pb2_grpc.HealthStub(await self.open_channel(shared=False))
        try:
            async for _ in health.Watch(health_pb2.HealthCheckRequest(service="SeniorityModel")):  # type: ignore[attr-defined]
                pass
        except aio.AioRpcError as error:
            self.seen[error.code(), False] += 1


async def _drain_under_load(proxy: ServiceProcess) -> Counter[tuple[StatusCode, bool]]:
    async with AsyncExitStack() as stack:
        load = _DrainLoad(proxy.target, stack)
        tasks = [asyncio.create_task(load.work(number)) for number in range(_WORKERS)]
        tasks.append(asyncio.create_task(load.watch_health()))
        async with asyncio.timeout(30):
            await load.is_loaded.wait()
        proxy.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)
        return load.seen


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_drain_under_load_returns_answers_or_unavailable_only(
    stage_with: StartProxyEnvironment, number: int
) -> None:
    """None of 64 workers on 33 connections gets CANCELLED. Those that go on are rejected with a pushback."""
    stage = stage_with(*UNLIMITED_RATE_FLAGS)
    seen = asyncio.run(_drain_under_load(stage.proxy))
    assert stage.proxy.process.wait(30) == 0
    assert {code for code, _ in seen} == {StatusCode.OK, StatusCode.UNAVAILABLE}
    assert seen[StatusCode.UNAVAILABLE, True] >= _WORKERS
    # The connection of each worker was closed.
    assert seen[StatusCode.UNAVAILABLE, False] == _WORKERS + 1
    assert "Traceback" not in stage.proxy.log
