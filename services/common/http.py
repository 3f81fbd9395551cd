"""The HTTP endpoint of a service: `/metrics`, `/healthz`, and whatever else it adds."""

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from services.common.errors import CommandError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpEndpoint:
    """Serves on the event loop itself, so an answer from `/healthz` says that the loop runs."""

    def __init__(self, *, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._app = web.Application()
        self._runner = web.AppRunner(self._app, access_log=None)
        self.add("/metrics", self._metrics)
        self.add("/healthz", self._healthz)

    def add(self, path: str, handler: Handler) -> None:
        """Answer GET (and HEAD) on `path`; only before `start`."""
        self._app.router.add_get(path, handler)

    async def start(self, address: str) -> str:
        """Listen on `host:port` and return the address really bound. Raises CommandError."""
        host, _, port = address.rpartition(":")
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, host.strip("[]") or None, int(port))
            await site.start()
        except (OSError, ValueError, OverflowError) as error:
            await self.close()
            message = f"--http-listen {address}: {error}"
            raise CommandError(message) from error
        return f"{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")
