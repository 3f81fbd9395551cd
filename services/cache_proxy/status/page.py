"""Serves the status page, `/`, and the same as data, `/status.json`.

However many look at it, Redis is read once a second at the most, and so is the page made; nobody waits longer
than a moment for either.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Literal

import msgspec
from aiohttp import web

from services.cache_proxy.cache.resilient_store import GuardedStore
from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.managed_queue import ProxyQueue
from services.cache_proxy.queue.snapshot import Overview
from services.cache_proxy.status import report as figures_of
from services.cache_proxy.status.render import HEADERS, Renderer
from services.cache_proxy.status.report import Figures, Scope, Self, Store
from services.cache_proxy.status.rolling_window import WINDOW_MINUTES
from services.cache_proxy.status.sampler import Ledger
from services.common.http_server import HttpEndpoint

_KEPT_SECONDS = 1.0
_WAIT_SECONDS = 0.3  # for Redis; after that the page tells what this replica knows


class StatusPage:
    """Served from the start; until `run` it says that the proxy starts.

    State: `_figures`, those of the last second, and since when; `_reading`, on its way; `_made`, the answers
    that were made of `_figures`. Event loop only.
    """

    def __init__(self, http: HttpEndpoint, *, metrics: ProxyMetrics, replica: str, cache_url: str) -> None:
        http.add("/", self._page)
        http.add("/status.json", self._json)
        self.ledger = Ledger(metrics)
        self._replica = replica
        self._store_kind = cache_url.partition(":")[0]
        self._began_at = time.monotonic()
        self._render = Renderer()
        self._store: GuardedStore | None = None
        self._queue: ProxyQueue | None = None
        self._figures: Figures | None = None
        self._figures_at = -math.inf
        self._reading: asyncio.Task[None] | None = None
        self._made: dict[Callable[[Figures], bytes], bytes] = {}

    async def run(self, *, store: GuardedStore, queue: ProxyQueue) -> None:
        """Count, until cancelled."""
        self._store, self._queue = store, queue
        try:
            await self.ledger.run()
        finally:
            self._queue = None
            if self._reading is not None:
                self._reading.cancel()

    async def _page(self, _request: web.Request) -> web.Response:
        return await self._answer(self._render, "text/html")

    async def _json(self, _request: web.Request) -> web.Response:
        return await self._answer(msgspec.json.encode, "application/json")

    async def _answer(self, make: Callable[[Figures], bytes], content_type: str) -> web.Response:
        await self._look()
        if self._figures is None:
            return web.Response(text="the proxy starts\n", status=503, headers=HEADERS)
        if make not in self._made:
            self._made[make] = make(self._figures)
        return web.Response(
            body=self._made[make], content_type=content_type, charset="utf-8", headers=HEADERS
        )

    async def _look(self) -> None:
        """Have figures that are no older than a second, if there can be any."""
        queue, store = self._queue, self._store
        if queue is None or store is None or time.monotonic() - self._figures_at < _KEPT_SECONDS:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(queue, store))
        await asyncio.wait({self._reading}, timeout=_WAIT_SECONDS)
        if time.monotonic() - self._figures_at >= _KEPT_SECONDS:
            self._keep(self._alone("redis slow", None, store))

    async def _read(self, queue: ProxyQueue, store: GuardedStore) -> None:
        try:
            overview = await queue.overview(minutes=WINDOW_MINUTES)
            if overview.reports is None:
                scope: Scope = "redis lost" if queue.lost else "not shared"
                self._keep(self._alone(scope, overview, store))
            else:
                self._keep(await figures_of.of_fleet(overview, self._self(store)))
        except StoreError:
            self._keep(self._alone("redis slow", None, store))

    def _alone(self, scope: Scope, overview: Overview | None, store: GuardedStore) -> Figures:
        return figures_of.of_replica(
            scope, overview, self._self(store), self.ledger.minutes(), now_seconds=self.ledger.now_seconds
        )

    def _self(self, store: GuardedStore) -> Self:
        lost = self._queue is not None and self._queue.lost
        state: Literal["ok", "refuses", "down"] = "refuses" if store.refusing else "ok"
        if lost or not store.up:
            state = "down"
        failures = (store.last_failure, self._queue.last_loss if self._queue else None)
        last = max((failure for failure in failures if failure), key=lambda failure: failure[1], default=None)
        return Self(
            replica=self._replica,
            store=Store(self._store_kind, state, figures_of.ago(last)),
            up_seconds=time.monotonic() - self._began_at,
        )

    def _keep(self, figures: Figures) -> None:
        self._figures, self._figures_at = figures, time.monotonic()
        self._made.clear()
