"""The gRPC server: the model's interface, health and reflection on every address."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cache_proxy.config.settings import ServerSettings
from services.cache_proxy.rpc import channel_args, reflection, unknown_methods
from services.cache_proxy.rpc.connections import ServerConnections
from services.cache_proxy.rpc.health import Health
from services.cache_proxy.rpc.inbound_limiter import InboundLimiter, InboundLimits
from services.cache_proxy.rpc.service_registrar import BoundedServiceRegistrar
from services.cache_proxy.rpc.servicer import SERVICE_NAME
from services.cache_proxy.rpc.unix_socket import UnixSocketLock
from services.common.grpc_ports import add_ports

_TERMINATION_WAIT_SECONDS = 3600.0
_INT_MAX = 2**31 - 1  # of a channel argument; as a number of milliseconds, 24 days
_DISCONNECT_GRACE_SECONDS = 1.0
_CONNECTION_POLL_SECONDS = 0.1
_CLOSE_ROUNDS, _CLOSE_INTERVAL_SECONDS = 4, 0.005
_log = logging.getLogger(__name__)

CredentialsFactory = Callable[[], grpc.ServerCredentials]


class GrpcService(Protocol):
    """What answers on the model's interface."""

    def add_to(self, server: aio.Server) -> None:
        """Serve on `server`."""


class Listeners:
    """The addresses of `--listen`, with TLS if there are `credentials`, and of `--listen-plaintext`.

    State: `addresses`, those that the server really has, in this order; `connections` to them. `_paths` of
    Unix sockets are held for as long as this is.
    """

    def __init__(self, settings: ServerSettings, credentials: CredentialsFactory | None) -> None:
        self._configured = [
            *(("--listen", address, credentials) for address in settings.listen),
            *(("--listen-plaintext", address, None) for address in settings.listen_plaintext),
        ]
        self._unix_socket_mode = settings.listen_mode
        self._socket_locks = [
            UnixSocketLock(address, flag_name=flag_name)
            for flag_name, address, _ in self._configured
            if address.startswith("unix:")
        ]
        self.addresses: list[str] = []
        self.connections = ServerConnections()

    def add_to(self, server: aio.Server) -> None:
        """Have `server` listen; again on the same ports if there was one before. Raises CommandError."""
        addresses = self.addresses or [address for _, address, _ in self._configured]
        with self.connections.track_listeners():
            self.addresses = [
                add_ports(
                    server, address, flag_name=flag_name, credentials=credentials, mode=self._unix_socket_mode
                )
                for (flag_name, _, credentials), address in zip(self._configured, addresses, strict=True)
            ]


class GrpcServer:
    """A server that is bound but not yet started, and its health.

    gRPC's own loop may end by a defect (see `known_methods.py`). The server is then made again in place.

    State: `_server`, replaced then; `_is_closing`, set once it is to end.
    """

    def __init__(self, make: Callable[[], aio.Server], *, listeners: Listeners, health: Health) -> None:
        self._make = make
        self._listeners = listeners
        self.health = health
        self._is_closing = False
        self._server = self._bind_new_server()

    @property
    def addresses(self) -> list[str]:
        """Those that it really has."""
        return self._listeners.addresses

    async def start(self) -> None:
        """Begin to answer, as NOT_SERVING."""
        for name in ("", SERVICE_NAME):
            await self.health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def set_serving(self) -> None:
        """Report SERVING from now on."""
        for name in ("", SERVICE_NAME):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def run(self) -> None:
        """Return when it was closed. Raises CommandError if it ended by itself and its address is gone."""
        while True:
            try:
                # Without a timeout, a cancellation here would also cancel what `stop` waits for.
                while await self._server.wait_for_termination(_TERMINATION_WAIT_SECONDS):
                    pass
            except Exception as error:  # noqa: BLE001 - whatever gRPC's loop ended of
                if not self._is_closing:
                    _log.error(
                        "the gRPC server ended by itself and is started again: %s", type(error).__name__
                    )
                    await self._restart()
                    continue
            return

    async def close_gracefully(self) -> None:
        """Close it once every caller has left, or after a second. The service refuses RPCs meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCONNECT_GRACE_SECONDS):
                while await asyncio.to_thread(self._listeners.connections.count):  # noqa: ASYNC110 - no event says it
                    await asyncio.sleep(_CONNECTION_POLL_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Close it at once: RPCs under way end as UNAVAILABLE, because their connection is closed."""
        self._is_closing = True
        await self._terminate()

    async def _restart(self) -> None:
        await self._terminate()
        self._server = self._bind_new_server()
        await self._server.start()

    async def _terminate(self) -> None:
        connections = self._listeners.connections
        connections.stop_accepting()
        # What the kernel had accepted by then becomes a connection of the server's only now.
        for _ in range(_CLOSE_ROUNDS):
            connections.close_all()
            await asyncio.sleep(_CLOSE_INTERVAL_SECONDS)
        connections.close_all()
        await self._server.stop(0)

    def _bind_new_server(self) -> aio.Server:
        server = self._make()
        self._listeners.add_to(server)
        return server


def bind_server(
    settings: ServerSettings, service: GrpcService, *, credentials: CredentialsFactory | None = None
) -> GrpcServer:
    """Bind every address. Raises CommandError naming the address that cannot be had, and why."""
    options = _channel_args(settings)
    health = Health()
    intake = InboundLimiter(InboundLimits.for_max_request(settings.max_request_bytes))

    def make() -> aio.Server:
        server = unknown_methods.create_server(options)
        service.add_to(server)
        open_services: Any = BoundedServiceRegistrar(server, intake)
        health_pb2_grpc.add_HealthServicer_to_server(health, open_services)
        reflection.add_to(open_services)
        return server

    return GrpcServer(make, listeners=Listeners(settings, credentials), health=health)


def _channel_args(settings: ServerSettings) -> list[tuple[str, int]]:
    age_ms = _to_milliseconds(settings.max_connection_age_seconds)
    listeners = len(settings.listen) + len(settings.listen_plaintext)
    return [
        ("grpc.so_reuseport", 0),  # a second proxy on the port is a mistake, not a helper
        ("grpc.max_receive_message_length", min(settings.max_request_bytes, _INT_MAX)),
        ("grpc.max_send_message_length", -1),
        *((("grpc.max_connection_age_ms", age_ms),) if age_ms else ()),
        # No shorter than the longest RPC: a connection that is of age still answers what it was asked.
        ("grpc.max_connection_age_grace_ms", _to_milliseconds(settings.max_wait_seconds)),
        *channel_args.server_args(listener_count=listeners),
    ]


def _to_milliseconds(seconds: float) -> int:
    return int(min(seconds * 1000, _INT_MAX))
