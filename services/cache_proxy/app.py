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

from services.cache_proxy.auth.authenticator import load_caller_auth
from services.cache_proxy.auth.model_credentials import load_model_credentials
from services.cache_proxy.auth.reloader import FileReloader
from services.cache_proxy.cache.entry import FreshnessPolicy
from services.cache_proxy.cache.invalidation import InvalidationFollower
from services.cache_proxy.cache.key import make_batch_digester
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.cache.store_factory import open_store
from services.cache_proxy.config.settings import Settings, read_secret
from services.cache_proxy.errors import ModelUnavailableError
from services.cache_proxy.lifecycle import background_task, stop_on_signals
from services.cache_proxy.model.client import ModelClient
from services.cache_proxy.model.dispatcher import Dispatcher
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue import peer_probe
from services.cache_proxy.queue.managed_queue import ManagedQueue, new_replica_id
from services.cache_proxy.queue.queue_factory import open_queue, watch_quotas
from services.cache_proxy.queue.waiters import WaiterRegistry
from services.cache_proxy.resolver import Resolver
from services.cache_proxy.rpc.inbound_limiter import InboundLimiter, InboundLimits
from services.cache_proxy.rpc.server import GrpcServer, bind_server
from services.cache_proxy.rpc.servicer import RequestLimits, RpcRecorder, SeniorityServicer
from services.cache_proxy.rpc.tracing import TracedServicer, TracingRecorder
from services.cache_proxy.status.page import StatusPage
from services.common import logs
from services.common.http_server import HttpEndpoint
from services.common.tracing import OFF, Tracing

_log = logging.getLogger(__name__)


async def serve(settings: Settings, tracing: Tracing = OFF) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal exits at once."""
    async with AsyncExitStack() as stack:
        stop = stop_on_signals()
        registry = _metrics_registry()
        metrics = ProxyMetrics(registry)
        renewals = FileReloader(metrics)
        callers = load_caller_auth(
            settings.caller_auth,
            renewals,
            listen=settings.server.listen,
            plaintext=settings.server.listen_plaintext,
        )
        replica = new_replica_id()
        ready = asyncio.Event()
        http = _http_endpoint(registry, ready=ready, replica=replica)
        status = StatusPage(http, metrics=metrics, replica=replica, cache_url=settings.cache.cache_url)
        stack.push_async_callback(http.close)
        http_bound = await http.start(settings.server.http_listen)
        opened = await stack.enter_async_context(
            open_store(settings.cache, settings.key, metrics, settings.answers, renewals)
        )
        lifetime = FreshnessPolicy(settings.answers.ttl_days, settings.answers.serve_stale)
        store = ResilientStore(
            opened.store,
            metrics=metrics,
            freshness=lifetime,
            invalidation_log=next(iter(opened.invalidation_logs), None),
            clock=opened.clock,
        )
        stack.push_async_callback(store.close)
        model = ModelClient(
            settings.model.model_target,
            deadline_seconds=settings.model.model_deadline_seconds,
            metrics=metrics,
            tracing=tracing,
            credentials=load_model_credentials(settings.model_auth, renewals),
        )
        renewals.add(model.reload)
        stack.push_async_callback(model.close)
        l1 = L1Cache(max_bytes=settings.server.l1_max_bytes)
        memories = _InvalidationTargets([(l1.remove, l1.clear), (store.drop_pending, store.drop_all_pending)])
        followers = [
            InvalidationFollower(log, remove=memories.remove, clear=memories.clear)
            for log in opened.invalidation_logs
        ]
        waiters = WaiterRegistry()
        queue = await stack.enter_async_context(
            open_queue(
                settings,
                opened.shared_client,
                replica=replica,
                http_bound=http_bound,
                on_outcome=waiters.resolve,
                on_model_backoff=waiters.fail_with_deadline_before,
                metrics=metrics,
                report_source=status.sampler,
                quota_provider=watch_quotas(settings, renewals),
                log_callbacks={
                    log.key: follower.on_log_tail
                    for log, follower in zip(opened.invalidation_logs, followers, strict=True)
                },
            )
        )
        memories.targets.append((queue.discard, queue.discard_all))
        await stack.enter_async_context(background_task(status.run(store=store, queue=queue)))
        _register_gauges(metrics, l1=l1, degraded=lambda: not store.available or queue.is_redis_lost)
        if opened.shared_client is None:  # else heartbeats tell
            for follower in followers:
                await stack.enter_async_context(background_task(follower.run()))
        dispatcher = Dispatcher(queue=queue, model=model, store=store, replica=replica, tracing=tracing)
        stack.push_async_callback(dispatcher.drain, timeout_seconds=0)
        await stack.enter_async_context(background_task(dispatcher.run()))
        secret = read_secret(settings.key.key_secret_file, flag_name="--key-secret-file")
        resolver = Resolver(
            digest_batch=make_batch_digester(normalize=settings.key.normalize, secret=secret),
            l1=l1,
            store=store,
            queue=queue,
            waiters=waiters,
            freshness=lifetime,
            clock=opened.clock,
            tracing=tracing,
        )
        stack.push_async_callback(resolver.close)
        service = SeniorityServicer(
            resolver=resolver,
            authenticate=callers.authenticate,
            limits=RequestLimits(
                max_pairs=settings.server.max_request_pairs,
                max_field_bytes=settings.server.max_field_bytes,
                max_wait_seconds=settings.server.max_wait_seconds,
            ),
            limiter=InboundLimiter(InboundLimits.for_max_request(settings.server.max_request_bytes)),
            recorder=_rpc_recorder(metrics, tracing, replica),
            tracing=tracing,
        )
        server = bind_server(
            settings.server,
            TracedServicer(service, tracing=tracing) if tracing.is_enabled else service,
            credentials=callers.credentials,
        )
        stack.push_async_callback(server.close)
        await stack.enter_async_context(background_task(renewals.run()))
        gc.freeze()  # what is built stays; and a full collection that walks a full L1 takes 24 ms
        await stack.enter_async_context(_running_server(server))
        async with _readiness(queue, server, ready):
            logs.announce_ready(listen=server.addresses, http=http_bound)
            await stop.wait()
        _log.info("draining")
        ready.clear()
        await server.health.enter_graceful_shutdown()
        await _drain(settings, server=server, servicer=service, queue=queue, dispatcher=dispatcher)
    _log.info("stopped")


@asynccontextmanager
async def _readiness(queue: ManagedQueue, server: GrpcServer, ready: asyncio.Event) -> AsyncIterator[None]:
    """Be ready from now on; where Redis refuses this replica a right, once that was mended.

    Until then the replica answers what it can. What Redis does later makes no ready replica unready.
    """

    async def become_ready() -> None:
        await queue.wait_for_access()
        await server.set_serving()
        ready.set()

    if queue.blocking_error is None:
        await become_ready()
        yield
    else:
        async with background_task(become_ready()):
            yield


@asynccontextmanager
async def _running_server(server: GrpcServer) -> AsyncIterator[None]:
    await server.start()
    async with background_task(server.run()):
        yield


async def _drain(
    settings: Settings,
    *,
    server: GrpcServer,
    servicer: SeniorityServicer,
    queue: ManagedQueue,
    dispatcher: Dispatcher,
) -> None:
    timeout_seconds = settings.server.drain_timeout_seconds
    await asyncio.sleep(settings.server.drain_delay_seconds)
    end_at = time.monotonic() + timeout_seconds
    try:
        # Connections stay: whoever still calls is told to ask elsewhere, with the time to wait before.
        await asyncio.wait_for(servicer.drain(), timeout_seconds)
    except TimeoutError:
        _log.warning("some requests did not end within the drain timeout")
        queue.fail_all(
            ModelUnavailableError("the proxy ended before the model answered", retry_after_seconds=1.0)
        )
    await server.close_gracefully()
    await dispatcher.drain(timeout_seconds=max(0.0, end_at - time.monotonic()))


def _rpc_recorder(metrics: ProxyMetrics, tracing: Tracing, replica: str) -> RpcRecorder:
    """Where RPCs are counted; those that nobody wants to hear of are only counted, at no cost."""
    if tracing.is_enabled or logging.getLogger().isEnabledFor(logging.DEBUG):
        return TracingRecorder(metrics.rpcs, tracing=tracing, replica=replica)
    return metrics.rpcs


def _http_endpoint(registry: CollectorRegistry, *, ready: asyncio.Event, replica: str) -> HttpEndpoint:
    http = HttpEndpoint(registry=registry)
    http.add_handler("/readyz", partial(_handle_readyz, ready))
    http.add_handler(peer_probe.REPLICA_ID_PATH, partial(_handle_replica_id, replica))
    return http


def _register_gauges(metrics: ProxyMetrics, *, l1: L1Cache, degraded: Callable[[], bool]) -> None:
    metrics.degraded.set_function(degraded)
    metrics.l1_bytes.set_function(lambda: l1.size_bytes)
    metrics.l1_entries.set_function(lambda: l1.entries)


def _metrics_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=registry)
    return registry


@dataclass(frozen=True, slots=True)
class _InvalidationTargets:
    """All that may hold an answer which is invalidated: how each forgets one, and everything."""

    targets: list[tuple[Callable[[bytes], None], Callable[[], None]]]

    def remove(self, digest: bytes) -> None:
        for remove, _ in self.targets:
            remove(digest)

    def clear(self) -> None:
        for _, clear in self.targets:
            clear()


async def _handle_readyz(ready: asyncio.Event, _request: web.Request) -> web.Response:
    return web.Response(text="ready\n") if ready.is_set() else web.Response(text="not ready\n", status=503)


async def _handle_replica_id(replica: str, _request: web.Request) -> web.Response:
    return web.Response(text=f"{replica}\n")
