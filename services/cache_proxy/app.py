"""The composition root: build every part of the proxy, start them in order, and stop them in reverse.

The module is longer than 250 lines because `serve` names every part once, in the order of the start.
"""

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
from services.cache_proxy.config.secret_file import read_secret
from services.cache_proxy.config.settings import Settings
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
from services.cache_proxy.rpc.recorder import RpcRecorder
from services.cache_proxy.rpc.server import GrpcServer, bind_server
from services.cache_proxy.rpc.servicer import RequestLimits, SeniorityServicer
from services.cache_proxy.rpc.tracing import TracedServicer, TracingRecorder
from services.cache_proxy.status.page import StatusPage
from services.common import logs
from services.common.http_server import HttpEndpoint
from services.common.tracing import OFF, Tracing

_log = logging.getLogger(__name__)


async def serve(settings: Settings, tracing: Tracing = OFF) -> None:
    """Serve until SIGTERM or SIGINT, then drain. A second signal exits at once."""
    async with AsyncExitStack() as stack:
        stop = stop_on_signals()
        registry = _metrics_registry()
        metrics = ProxyMetrics(registry)
        reloader = FileReloader(metrics)
        caller_auth = load_caller_auth(
            settings.caller_auth,
            reloader,
            listen=settings.server.listen,
            plaintext=settings.server.listen_plaintext,
        )

        # The HTTP endpoint starts first, so that /metrics and the status page show the start of the rest.
        replica = new_replica_id()
        ready = asyncio.Event()
        http_endpoint = _http_endpoint(registry, ready=ready, replica=replica)
        status = StatusPage(
            http_endpoint, metrics=metrics, replica=replica, cache_url=settings.cache.cache_url
        )
        stack.push_async_callback(http_endpoint.close)
        http_address = await http_endpoint.start(settings.server.http_listen)

        # Caches, and the client of the model.
        opened_store = await stack.enter_async_context(
            open_store(settings.cache, settings.key, metrics, settings.answers, reloader)
        )
        freshness = FreshnessPolicy(settings.answers.ttl_days, settings.answers.serve_stale)
        store = ResilientStore(
            opened_store.store,
            metrics=metrics,
            freshness=freshness,
            invalidation_log=next(iter(opened_store.invalidation_logs), None),
            clock=opened_store.clock,
        )
        stack.push_async_callback(store.close)
        model = ModelClient(
            settings.model.model_target,
            deadline_seconds=settings.model.model_deadline_seconds,
            metrics=metrics,
            tracing=tracing,
            credentials=load_model_credentials(settings.model_auth, reloader),
        )
        reloader.add(model.reload)
        stack.push_async_callback(model.close)
        l1 = L1Cache(max_bytes=settings.server.l1_max_bytes)

        # An invalidated answer is removed from L1, from pending writes and from the queue.
        invalidation_targets = _InvalidationTargets(
            [(l1.remove, l1.clear), (store.drop_pending, store.drop_all_pending)]
        )
        followers = [
            InvalidationFollower(log, remove=invalidation_targets.remove, clear=invalidation_targets.clear)
            for log in opened_store.invalidation_logs
        ]

        waiters = WaiterRegistry()
        queue = await stack.enter_async_context(
            open_queue(
                settings,
                opened_store.shared_client,
                replica=replica,
                http_bound=http_address,
                on_outcome=waiters.resolve,
                on_model_backoff=waiters.fail_with_deadline_before,
                metrics=metrics,
                report_source=status.sampler,
                quota_provider=watch_quotas(settings, reloader),
                log_callbacks={
                    log.key: follower.on_log_tail
                    for log, follower in zip(opened_store.invalidation_logs, followers, strict=True)
                },
            )
        )
        invalidation_targets.targets.append((queue.discard, queue.discard_all))
        await stack.enter_async_context(background_task(status.run(store=store, queue=queue)))
        _register_gauges(metrics, l1=l1, degraded=lambda: not store.available or queue.is_redis_lost)
        # With a shared Redis, the heartbeats bring new invalidations. Without, they are polled.
        if opened_store.shared_client is None:
            for follower in followers:
                await stack.enter_async_context(background_task(follower.run()))

        dispatcher = Dispatcher(queue=queue, model=model, store=store, replica=replica, tracing=tracing)
        stack.push_async_callback(dispatcher.drain, timeout_seconds=0)
        await stack.enter_async_context(background_task(dispatcher.run()))

        # The read path and the gRPC server on top of it.
        secret = read_secret(settings.key.key_secret_file, flag_name="--key-secret-file")
        resolver = Resolver(
            digest_batch=make_batch_digester(normalize=settings.key.normalize, secret=secret),
            l1=l1,
            store=store,
            queue=queue,
            waiters=waiters,
            freshness=freshness,
            clock=opened_store.clock,
            tracing=tracing,
        )
        stack.push_async_callback(resolver.close)
        servicer = SeniorityServicer(
            resolver=resolver,
            authenticate=caller_auth.authenticate,
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
            TracedServicer(servicer, tracing=tracing) if tracing.is_enabled else servicer,
            credentials=caller_auth.credentials,
        )
        stack.push_async_callback(server.close)
        await stack.enter_async_context(background_task(reloader.run()))

        # What was built stays until the end. A full collection that walks a full L1 would take 24 ms.
        gc.freeze()
        await stack.enter_async_context(_running_server(server))
        async with _readiness(queue, server, ready):
            logs.announce_ready(listen=server.addresses, http=http_address)
            await stop.wait()
        _log.info("draining")
        ready.clear()
        await server.health.enter_graceful_shutdown()
        await _drain(settings, server=server, servicer=servicer, queue=queue, dispatcher=dispatcher)
    _log.info("stopped")


@asynccontextmanager
async def _readiness(queue: ManagedQueue, server: GrpcServer, ready: asyncio.Event) -> AsyncIterator[None]:
    """Report the replica as ready, as soon as Redis grants it all rights that it needs.

    Until then the replica answers what it can. A replica that is ready stays so, whatever happens to Redis
    later.
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
    deadline = time.monotonic() + timeout_seconds
    try:
        # Connections stay open. New requests get UNAVAILABLE with a pushback, so that callers turn to
        # other replicas.
        await asyncio.wait_for(servicer.drain(), timeout_seconds)
    except TimeoutError:
        _log.warning("some requests did not end within the drain timeout")
        queue.fail_all(
            ModelUnavailableError("the proxy ended before the model answered", retry_after_seconds=1.0)
        )
    await server.close_gracefully()
    await dispatcher.drain(timeout_seconds=max(0.0, deadline - time.monotonic()))


def _rpc_recorder(metrics: ProxyMetrics, tracing: Tracing, replica: str) -> RpcRecorder:
    """Return what records RPCs: metrics alone, or spans and debug lines too if they are enabled.

    Metrics alone cost nothing beyond the counters.
    """
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
    """Everything that can hold an invalidated answer.

    `targets` are pairs of functions: the first removes the answer of one digest, the second all answers.
    """

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
