"""Serve the status page, `/`, and the same data as JSON, `/status.json`.

However many viewers there are, Redis is read and the page is rendered at most once a second. No viewer waits
longer than `_READ_TIMEOUT_SECONDS` for Redis.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Literal

import msgspec
from aiohttp import web

from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.managed_queue import ManagedQueue
from services.cache_proxy.queue.snapshot import QueueSnapshot
from services.cache_proxy.status.render import HEADERS, Renderer
from services.cache_proxy.status.report import (
    ReplicaInfo,
    Scope,
    StatusReport,
    StoreStatus,
    failure_info,
    fleet_report,
    replica_report,
)
from services.cache_proxy.status.rolling_window import WINDOW_MINUTES
from services.cache_proxy.status.sampler import MetricsSampler
from services.common.http_server import HttpEndpoint

_MAX_REPORT_AGE_SECONDS = 1.0
# If Redis takes longer, the page shows what this replica knows.
_READ_TIMEOUT_SECONDS = 0.3


class StatusPage:
    """The handlers of the status page. Until `run` is called they respond that the proxy is starting.

    State (event loop only):

    - `_report` and `_report_at`: the report of the last second and when it was made.
    - `_refresh_task`: the task that makes the next report.
    - `_rendered`: the responses rendered from `_report`.
    """

    def __init__(self, http: HttpEndpoint, *, metrics: ProxyMetrics, replica: str, cache_url: str) -> None:
        http.add_handler("/", self._handle_page)
        http.add_handler("/status.json", self._handle_json)
        self.sampler = MetricsSampler(metrics)
        self._replica = replica
        self._store_kind = cache_url.partition(":")[0]
        self._started_at = time.monotonic()
        self._renderer = Renderer()
        self._store: ResilientStore | None = None
        self._queue: ManagedQueue | None = None
        self._report: StatusReport | None = None
        self._report_at = -math.inf
        self._refresh_task: asyncio.Task[None] | None = None
        self._rendered: dict[Callable[[StatusReport], bytes], bytes] = {}

    async def run(self, *, store: ResilientStore, queue: ManagedQueue) -> None:
        """Sample the metrics until cancelled."""
        self._store = store
        self._queue = queue
        try:
            await self.sampler.run()
        finally:
            self._queue = None
            if self._refresh_task is not None:
                self._refresh_task.cancel()

    async def _handle_page(self, _request: web.Request) -> web.Response:
        return await self._respond(self._renderer, "text/html")

    async def _handle_json(self, _request: web.Request) -> web.Response:
        return await self._respond(msgspec.json.encode, "application/json")

    async def _respond(self, render: Callable[[StatusReport], bytes], content_type: str) -> web.Response:
        await self._refresh()
        if self._report is None:
            return web.Response(text="the proxy starts\n", status=503, headers=HEADERS)
        if render not in self._rendered:
            self._rendered[render] = render(self._report)
        return web.Response(
            body=self._rendered[render], content_type=content_type, charset="utf-8", headers=HEADERS
        )

    async def _refresh(self) -> None:
        """Replace the report if it is older than a second and the proxy has started."""
        queue = self._queue
        store = self._store
        if queue is None or store is None or time.monotonic() - self._report_at < _MAX_REPORT_AGE_SECONDS:
            return
        if self._refresh_task is None or self._refresh_task.done():
            self._refresh_task = asyncio.create_task(self._read_report(queue, store))
        await asyncio.wait({self._refresh_task}, timeout=_READ_TIMEOUT_SECONDS)
        if time.monotonic() - self._report_at >= _MAX_REPORT_AGE_SECONDS:
            self._set_report(self._replica_report("redis slow", None, store))

    async def _read_report(self, queue: ManagedQueue, store: ResilientStore) -> None:
        try:
            snapshot = await queue.snapshot(minutes=WINDOW_MINUTES)
            if snapshot.reports is None:
                scope: Scope = "redis lost" if queue.is_redis_lost else "not shared"
                self._set_report(self._replica_report(scope, snapshot, store))
            else:
                self._set_report(await fleet_report(snapshot, self._replica_info(store)))
        except StoreError:
            self._set_report(self._replica_report("redis slow", None, store))

    def _replica_report(
        self, scope: Scope, snapshot: QueueSnapshot | None, store: ResilientStore
    ) -> StatusReport:
        return replica_report(
            scope,
            snapshot,
            self._replica_info(store),
            self.sampler.minutes(),
            now_seconds=self.sampler.now_seconds,
        )

    def _replica_info(self, store: ResilientStore) -> ReplicaInfo:
        is_lost = self._queue is not None and self._queue.is_redis_lost
        state: Literal["ok", "refuses", "down"] = "refuses" if store.rejecting_writes else "ok"
        if is_lost or not store.available:
            state = "down"
        failures = (store.last_failure, self._queue.last_loss if self._queue else None)
        last = max((failure for failure in failures if failure), key=lambda failure: failure[1], default=None)
        return ReplicaInfo(
            replica=self._replica,
            store=StoreStatus(self._store_kind, state, failure_info(last)),
            up_seconds=time.monotonic() - self._started_at,
        )

    def _set_report(self, report: StatusReport) -> None:
        self._report = report
        self._report_at = time.monotonic()
        self._rendered.clear()
