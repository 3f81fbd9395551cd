"""Composition root: builds every part, starts them in order, and ends them in the other."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

from aiohttp import web
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from protos import seniority_pb2, seniority_pb2_grpc
from services.cache_proxy.callers import identify_by_metadata
from services.cache_proxy.config import (
    DEFAULT_EMBEDDED_DIR,
    CacheSettings,
    KeySettings,
    Settings,
    read_secret,
    redact,
)
from services.cache_proxy.dispatcher import Dispatcher
from services.cache_proxy.errors import Unavailable
from services.cache_proxy.key import Digester, make_digester
from services.cache_proxy.l1 import L1Cache
from services.cache_proxy.metrics import ProxyMetrics
from services.cache_proxy.model import ModelClient
from services.cache_proxy.queue.local import LocalQueue, QueueLimits
from services.cache_proxy.resolver import Resolver
from services.cache_proxy.servicer import RequestLimits, SeniorityService
from services.cache_proxy.store import Store
from services.cache_proxy.store.embedded import EmbeddedServer
from services.cache_proxy.store.guarded import GuardedStore
from services.cache_proxy.store.memory import MemoryStore
from services.cache_proxy.store.redis import RedisStore, connect
from services.cache_proxy.waiters import Waiters
from services.common import logs
from services.common.errors import CommandError
from services.common.http import HttpEndpoint

_log = logging.getLogger(__name__)

SERVICE_NAME = seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"].full_name
_EMBEDDED_TIMEOUT_SECONDS = 2.0  # no network in between, but a folder on a slow disk
_GRACE_SECONDS = 1.0


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal exits at once."""
    async with AsyncExitStack() as stack:
        registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        metrics = ProxyMetrics(registry)
        stop = _stop_on_signals()
        store = GuardedStore(
            await stack.enter_async_context(_open_store(settings.cache, settings.key, metrics)),
            metrics=metrics,
        )
        stack.push_async_callback(store.close)
        model = ModelClient(
            settings.model.model_target,
            deadline_seconds=settings.model.model_deadline_seconds,
            metrics=metrics,
        )
        stack.push_async_callback(model.close)
        waiters = Waiters()
        queue = LocalQueue(_queue_limits(settings), settle=waiters.settle, metrics=metrics)
        dispatcher = Dispatcher(queue=queue, model=model, store=store)
        await stack.enter_async_context(_running(dispatcher))
        l1 = L1Cache(max_bytes=settings.server.l1_max_bytes)
        metrics.l1_bytes.set_function(lambda: l1.size_bytes)
        metrics.l1_entries.set_function(lambda: l1.entries)
        resolver = Resolver(digest=_digester(settings.key), l1=l1, store=store, queue=queue, waiters=waiters)
        service = SeniorityService(
            resolver=resolver,
            identify=identify_by_metadata,
            limits=RequestLimits(
                max_pairs=settings.server.max_request_pairs,
                max_field_bytes=settings.server.max_field_bytes,
                max_wait_seconds=settings.server.max_wait_seconds,
            ),
            metrics=metrics,
        )
        server, health, bound = _listen(settings, service)
        http = HttpEndpoint(registry=registry)
        ready = asyncio.Event()
        http.add("/readyz", partial(_readyz, ready))
        stack.push_async_callback(http.close)
        http_bound = await http.start(settings.server.http_listen)
        await server.start()
        stack.push_async_callback(server.stop, 0)
        await health.set("", health_pb2.HealthCheckResponse.SERVING)
        await health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        ready.set()
        logs.announce_ready(listen=bound, http=http_bound)
        await stop.wait()
        _log.info("draining")
        ready.clear()
        await health.enter_graceful_shutdown()
        await _drain(settings, server=server, service=service, queue=queue, dispatcher=dispatcher)
    _log.info("stopped")


async def _drain(
    settings: Settings,
    *,
    server: aio.Server,
    service: SeniorityService,
    queue: LocalQueue,
    dispatcher: Dispatcher,
) -> None:
    await asyncio.sleep(settings.server.drain_delay_seconds)
    service.drain()
    end_at = time.monotonic() + settings.server.drain_timeout_seconds
    stopped = asyncio.create_task(server.stop(settings.server.drain_timeout_seconds + _GRACE_SECONDS))
    await asyncio.wait({stopped}, timeout=settings.server.drain_timeout_seconds)
    if not stopped.done():
        _log.warning("some requests did not end within the drain timeout")
        queue.end_all(Unavailable("the proxy ended before the model answered", retry_after_seconds=1.0))
    await stopped
    await dispatcher.finish(within_seconds=max(0.0, end_at - time.monotonic()))


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)  # the embedded server, if there is one, ends with its parent
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
    return stop


@asynccontextmanager
async def _open_store(cache: CacheSettings, key: KeySettings, metrics: ProxyMetrics) -> AsyncIterator[Store]:
    scheme, _, rest = cache.cache_url.partition(":")
    if scheme == "memory":
        yield MemoryStore()
        return
    server = None
    url, timeout_seconds = cache.cache_url, cache.cache_timeout_seconds
    if scheme == "embedded":
        server = EmbeddedServer(Path(rest or DEFAULT_EMBEDDED_DIR))
        started_at = time.monotonic()
        await server.start()
        _log.warning(
            "the cache is embedded: it and the limit on the model are this process's alone; "
            "replicas that share them need --cache-url redis://…",
            extra={
                "folder": rest or DEFAULT_EMBEDDED_DIR,
                "seconds": round(time.monotonic() - started_at, 3),
            },
        )
        url, timeout_seconds = server.url, max(timeout_seconds, _EMBEDDED_TIMEOUT_SECONDS)
    try:
        password = read_secret(cache.cache_password_file, flag_name="--cache-password-file")
        client = connect(
            url,
            timeout_seconds=timeout_seconds,
            username=cache.cache_username,
            password=password.decode() if password else None,
            tls_ca=cache.cache_tls_ca,
        )
        if server is None:
            _log.info("the cache is at %s", redact(url))
        yield RedisStore(client, namespace=_namespace(key), metrics=metrics)
    finally:
        if server is not None:
            await server.stop()


def _namespace(key: KeySettings) -> str:
    """The base of the namespace's keys: deployment, then version of layout, normal form and model."""
    return f"{key.key_prefix}:c1:{key.normalize}1:{quote(key.model_version, safe='')}:"


def _digester(key: KeySettings) -> Digester:
    return make_digester(
        normalize=key.normalize, secret=read_secret(key.key_secret_file, flag_name="--key-secret-file")
    )


def _queue_limits(settings: Settings) -> QueueLimits:
    model, share = settings.model, settings.model.expected_replicas
    return QueueLimits(
        batch_pairs=model.model_batch_size,
        batch_bytes=model.model_batch_bytes,
        pairs_per_second=model.model_rate / share,
        calls_per_second=model.model_calls_per_second / share,
        linger_seconds=model.linger_seconds,
        max_pairs=settings.server.max_queued_pairs,
        max_bytes=settings.server.max_queued_bytes,
    )


@asynccontextmanager
async def _running(dispatcher: Dispatcher) -> AsyncIterator[None]:
    task = asyncio.create_task(dispatcher.run())
    task.add_done_callback(_die_with)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await dispatcher.finish(within_seconds=0)


def _die_with(task: "asyncio.Task[None]") -> None:
    """A proxy that calls the model no more, yet looks alive, is worse than one that is restarted."""
    if not task.cancelled() and task.exception() is not None:
        _log.critical("the dispatcher ended", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)


def _listen(settings: Settings, service: SeniorityService) -> tuple[aio.Server, HealthServicer, list[str]]:
    age_seconds = settings.server.max_connection_age_seconds
    longest_seconds = settings.server.max_wait_seconds
    options = [
        ("grpc.so_reuseport", 0),  # a second proxy on the port is a mistake, not a helper
        ("grpc.max_receive_message_length", settings.server.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        *((("grpc.max_connection_age_ms", int(age_seconds * 1000)),) if age_seconds else ()),
        ("grpc.max_connection_age_grace_ms", int(longest_seconds * 1000)),
    ]
    server = aio.server(options=options)
    health = HealthServicer()
    seniority_pb2_grpc.add_SeniorityModelServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (
        SERVICE_NAME,
        health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
        reflection.SERVICE_NAME,
    )
    reflection.enable_server_reflection(names, server)
    bound = []
    for address in settings.server.listen:
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            message = f"--listen {address}: the address cannot be used (taken, or not this host's)"
            raise CommandError(message) from error
        bound.append(address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}")
    return server, health, bound


async def _readyz(ready: asyncio.Event, _request: web.Request) -> web.Response:
    return web.Response(text="ready\n") if ready.is_set() else web.Response(text="draining\n", status=503)
