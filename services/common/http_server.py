"""The HTTP endpoint of a service: `/metrics`, `/healthz`, and handlers that the service adds."""

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from services.common.errors import CommandError
from services.common.listening import ListenAddress, bind_sockets

_MAX_CONNECTIONS = 64
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpEndpoint:
    """Serves HTTP on the service's event loop, so a response from `/healthz` shows that the loop runs."""

    def __init__(self, *, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._app = web.Application()
        self._runner = web.AppRunner(self._app, access_log=None)
        self._servers: list[asyncio.Server] = []
        self.add_handler("/metrics", self._handle_metrics)
        self.add_handler("/healthz", self._handle_healthz)

    def add_handler(self, path: str, handler: Handler) -> None:
        """Handle GET (and HEAD) on `path`. Must be called before `start`."""
        self._app.router.add_get(path, handler)

    async def start(self, address: str) -> str:
        """Listen on the address (see `listening.py`) and return the bound address. Raises CommandError."""
        sockets = bind_sockets(address, flag_name="--http-listen")
        port = sockets[0].getsockname()[1]
        await self._runner.setup()
        loop = asyncio.get_running_loop()
        try:
            for one in sockets:
                self._servers.append(await loop.create_server(self._accept, sock=one))
        except OSError as error:
            # Another process has bound the address meanwhile.
            await self.close()
            message = f"--http-listen {address}: {error.strerror}"
            raise CommandError(message) from error
        return ListenAddress.parse(address).with_port(port)

    def _accept(self) -> asyncio.Protocol:
        """Accept a connection; above the limit, close the oldest one.

        Responses take milliseconds, so the oldest of many connections is idle or too slow.
        """
        server = self._runner.server
        assert server is not None  # noqa: S101 - set up before it listens
        # They are closed in the next iteration of the loop.
        for oldest in server.connections[: 1 - _MAX_CONNECTIONS]:
            oldest.force_close()
        return server()

    async def close(self) -> None:
        """Stop listening."""
        for one in self._servers:
            one.close()
        await self._runner.cleanup()

    async def _handle_metrics(self, request: web.Request) -> web.Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        except (ValueError, TypeError):
            # prometheus_client fails on a version that is not a number.
            encode, content_type = choose_encoder("")
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})

    async def _handle_healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")
