"""Composition root: builds every part, starts them in order, and ends them in the other."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from aiohttp import web
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from services.cache_proxy.auth.model_credentials import open_callers, open_way
from services.cache_proxy.auth.reloader import Renewals
from services.cache_proxy.cache.entry import Lifetime
from services.cache_proxy.cache.invalidation import Follower
from services.cache_proxy.cache.key import make_batch_digester
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.cache.resilient_store import GuardedStore
from services.cache_proxy.cache.store_factory import open_store
from services.cache_proxy.config.settings import Settings, read_secret
from services.cache_proxy.errors import Unavailable
from services.cache_proxy.lifecycle import running, stop_on_signals
from services.cache_proxy.model.client import ModelClient
from services.cache_proxy.model.dispatcher import Dispatcher
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue import peer_probe
from services.cache_proxy.queue.managed_queue import ProxyQueue, new_replica
from services.cache_proxy.queue.queue_factory import follow_quotas, open_queue
from services.cache_proxy.queue.waiters import Waiters
from services.cache_proxy.resolver import Resolver
from services.cache_proxy.rpc import server
from services.cache_proxy.rpc.inbound_limiter import Intake, IntakeLimits
from services.cache_proxy.rpc.servicer import RequestLimits, RpcBooks, SeniorityService
from services.cache_proxy.rpc.tracing import ToldBooks, TracedService
from services.cache_proxy.status.page import StatusPage
from services.common import logs
from services.common.http_server import HttpEndpoint
from services.common.tracing import OFF, Tracing

_log = logging.getLogger(__name__)


async def serve(settings: Settings, tracing: Tracing = OFF) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal exits at once."""
    async with AsyncExitStack() as stack:
        stop = stop_on_signals()
        registry = _registry()
        metrics = ProxyMetrics(registry)
        renewals = Renewals(metrics)
        callers = open_callers(
            settings.callers,
            renewals,
            listen=settings.server.listen,
            plaintext=settings.server.listen_plaintext,
        )
        replica = new_replica()
        ready = asyncio.Event()
        http = _http(registry, ready=ready, replica=replica)
        status = StatusPage(http, metrics=metrics, replica=replica, cache_url=settings.cache.cache_url)
        stack.push_async_callback(http.close)
        http_bound = await http.start(settings.server.http_listen)
        opened = await stack.enter_async_context(
            open_store(settings.cache, settings.key, metrics, settings.answers, renewals)
        )
        lifetime = Lifetime(settings.answers.ttl_days, settings.answers.serve_stale)
        store = GuardedStore(
            opened.store,
            metrics=metrics,
            lifetime=lifetime,
            log=next(iter(opened.logs), None),
            clock=opened.clock,
        )
        stack.push_async_callback(store.close)
        model = ModelClient(
            settings.model.model_target,
            deadline_seconds=settings.model.model_deadline_seconds,
            metrics=metrics,
            tracing=tracing,
            way=open_way(settings.model_access, renewals),
        )
        renewals.add(model.renew)
        stack.push_async_callback(model.close)
        l1 = L1Cache(max_bytes=settings.server.l1_max_bytes)
        memories = _Memories([(l1.remove, l1.clear), (store.discard, store.discard_all)])
        followers = [Follower(log, remove=memories.remove, clear=memories.clear) for log in opened.logs]
        waiters = Waiters()
        queue = await stack.enter_async_context(
            open_queue(
                settings, opened.shared, replica=replica, http_bound=http_bound, settle=waiters.settle,
                give_up=waiters.give_up_before, metrics=metrics, reporter=status.ledger,
                quotas_now=follow_quotas(settings, renewals),
                logs={log.key: follower.hear for log, follower in zip(opened.logs, followers, strict=True)},
            )
        )  # fmt: skip
        memories.all.append((queue.discard, queue.discard_all))
        await stack.enter_async_context(running(status.run(store=store, queue=queue)))
        _show(metrics, l1=l1, degraded=lambda: not store.up or queue.lost)
        if opened.shared is None:  # else heartbeats tell
            for follower in followers:
                await stack.enter_async_context(running(follower.run()))
        dispatcher = Dispatcher(queue=queue, model=model, store=store, replica=replica, tracing=tracing)
        stack.push_async_callback(dispatcher.finish, within_seconds=0)
        await stack.enter_async_context(running(dispatcher.run()))
        secret = read_secret(settings.key.key_secret_file, flag_name="--key-secret-file")
        resolver = Resolver(
            digests=make_batch_digester(normalize=settings.key.normalize, secret=secret),
            l1=l1,
            store=store,
            queue=queue,
            waiters=waiters,
            lifetime=lifetime,
            clock=opened.clock,
            tracing=tracing,
        )
        stack.push_async_callback(resolver.close)
        service = SeniorityService(
            resolver=resolver,
            identify=callers.identify,
            limits=RequestLimits(
                max_pairs=settings.server.max_request_pairs,
                max_field_bytes=settings.server.max_field_bytes,
                max_wait_seconds=settings.server.max_wait_seconds,
            ),
            intake=Intake(IntakeLimits.of(settings.server.max_request_bytes)),
            books=_books(metrics, tracing, replica),
            tracing=tracing,
        )
        front = server.listen(
            settings.server,
            TracedService(service, tracing=tracing) if tracing.is_on else service,
            credentials=callers.credentials,
        )
        stack.push_async_callback(front.close)
        await stack.enter_async_context(running(renewals.run()))
        gc.freeze()  # what is built stays; and a full collection that walks a full L1 takes 24 ms
        await stack.enter_async_context(_serving(front))
        async with _readiness(queue, front, ready):
            logs.announce_ready(listen=front.addresses, http=http_bound)
            await stop.wait()
        _log.info("draining")
        ready.clear()
        await front.health.enter_graceful_shutdown()
        await _drain(settings, front=front, service=service, queue=queue, dispatcher=dispatcher)
    _log.info("stopped")


@asynccontextmanager
async def _readiness(
    queue: ProxyQueue, front: server.GrpcServer, ready: asyncio.Event
) -> AsyncIterator[None]:
    """Be ready from now on; where Redis refuses this replica a right, once that was mended.

    Until then the replica answers what it can. What Redis does later makes no ready replica unready.
    """

    async def become_ready() -> None:
        await queue.admitted()
        await front.become_healthy()
        ready.set()

    if queue.refusal is None:
        await become_ready()
        yield
    else:
        async with running(become_ready()):
            yield


@asynccontextmanager
async def _serving(front: server.GrpcServer) -> AsyncIterator[None]:
    await front.start()
    async with running(front.run()):
        yield


async def _drain(
    settings: Settings,
    *,
    front: server.GrpcServer,
    service: SeniorityService,
    queue: ProxyQueue,
    dispatcher: Dispatcher,
) -> None:
    timeout_seconds = settings.server.drain_timeout_seconds
    await asyncio.sleep(settings.server.drain_delay_seconds)
    end_at = time.monotonic() + timeout_seconds
    try:
        # Connections stay: whoever still calls is told to ask elsewhere, with the time to wait before.
        await asyncio.wait_for(service.drain(), timeout_seconds)
    except TimeoutError:
        _log.warning("some requests did not end within the drain timeout")
        queue.end_all(Unavailable("the proxy ended before the model answered", retry_after_seconds=1.0))
    await front.finish()
    await dispatcher.finish(within_seconds=max(0.0, end_at - time.monotonic()))


def _books(metrics: ProxyMetrics, tracing: Tracing, replica: str) -> RpcBooks:
    """Where RPCs are counted; those that nobody wants to hear of are only counted, at no cost."""
    if tracing.is_on or logging.getLogger().isEnabledFor(logging.DEBUG):
        return ToldBooks(metrics.rpcs, tracing=tracing, replica=replica)
    return metrics.rpcs


def _http(registry: CollectorRegistry, *, ready: asyncio.Event, replica: str) -> HttpEndpoint:
    http = HttpEndpoint(registry=registry)
    http.add("/readyz", partial(_readyz, ready))
    http.add(peer_probe.PATH, partial(_replica, replica))
    return http


def _show(metrics: ProxyMetrics, *, l1: L1Cache, degraded: Callable[[], bool]) -> None:
    metrics.degraded.set_function(degraded)
    metrics.l1_bytes.set_function(lambda: l1.size_bytes)
    metrics.l1_entries.set_function(lambda: l1.entries)


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


@dataclass(frozen=True, slots=True)
class _Memories:
    """All that may hold an answer which is invalidated: how each forgets one, and everything."""

    all: list[tuple[Callable[[bytes], None], Callable[[], None]]]

    def remove(self, digest: bytes) -> None:
        for remove, _ in self.all:
            remove(digest)

    def clear(self) -> None:
        for _, clear in self.all:
            clear()


async def _readyz(ready: asyncio.Event, _request: web.Request) -> web.Response:
    return web.Response(text="ready\n") if ready.is_set() else web.Response(text="not ready\n", status=503)


async def _replica(replica: str, _request: web.Request) -> web.Response:
    return web.Response(text=f"{replica}\n")
