"""The gRPC server: the model's interface, health and reflection on every address."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cache_proxy.config.server_settings import ServerSettings
from services.cache_proxy.rpc import channel_args, reflection, unknown_methods
from services.cache_proxy.rpc.connections import ServerConnections
from services.cache_proxy.rpc.health import Health
from services.cache_proxy.rpc.inbound_limiter import InboundLimiter, InboundLimits
from services.cache_proxy.rpc.infer_method import SERVICE_NAME
from services.cache_proxy.rpc.service_registrar import BoundedServiceRegistrar
from services.cache_proxy.rpc.unix_socket import UnixSocketLock
from services.common.grpc_ports import add_ports

_TERMINATION_WAIT_SECONDS = 3600.0
# The largest channel argument. As milliseconds it is 24 days.
_INT_MAX = 2**31 - 1
_DISCONNECT_GRACE_SECONDS = 1.0
_CONNECTION_POLL_SECONDS = 0.1
_CLOSE_ROUNDS = 4
_CLOSE_INTERVAL_SECONDS = 0.005
_log = logging.getLogger(__name__)

CredentialsFactory = Callable[[], grpc.ServerCredentials]


class GrpcService(Protocol):
    """Implement the model's interface."""

    def add_to(self, server: aio.Server) -> None:
        """Register the methods on `server`."""


class Listeners:
    """The addresses of `--listen`, with TLS if there are `credentials`, and those of `--listen-plaintext`.

    State: `addresses`, in the same order, with the ports that the server really has; `connections` to them;
    `_socket_locks`, which keep the paths of Unix sockets for as long as this object lives.
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
        """Make `server` listen, on the ports of the previous server if there was one.

        Raise CommandError if an address cannot be bound.
        """
        addresses = self.addresses or [address for _, address, _ in self._configured]
        with self.connections.track_listeners():
            self.addresses = [
                add_ports(
                    server,
                    address,
                    flag_name=flag_name,
                    credentials=credentials,
                    mode=self._unix_socket_mode,
                )
                for (flag_name, _, credentials), address in zip(self._configured, addresses, strict=True)
            ]


class GrpcServer:
    """A server that is bound but not started, and its health.

    gRPC's accept loop can end because of a defect (see `unknown_methods.py`). A new server then replaces it
    on the same addresses.

    State: `_server`, which a restart replaces; `_is_closing`, set once the server is to end.
    """

    def __init__(
        self, make_server: Callable[[], aio.Server], *, listeners: Listeners, health: Health
    ) -> None:
        self._make_server = make_server
        self._listeners = listeners
        self.health = health
        self._is_closing = False
        self._server = self._bind_new_server()

    @property
    def addresses(self) -> list[str]:
        """Return the addresses that the server listens on, with their real ports."""
        return self._listeners.addresses

    async def start(self) -> None:
        """Begin to serve, with the health status NOT_SERVING."""
        for name in ("", SERVICE_NAME):
            await self.health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def set_serving(self) -> None:
        """Change the health status to SERVING."""
        for name in ("", SERVICE_NAME):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def run(self) -> None:
        """Return when the server was closed, and restart it if it ends before.

        Raise CommandError if it cannot be restarted because its address is taken.
        """
        while True:
            try:
                # Without a timeout, a cancellation here would also cancel what `stop` waits for.
                while await self._server.wait_for_termination(_TERMINATION_WAIT_SECONDS):
                    pass
            # Any exception may have ended gRPC's loop.
            except Exception as error:  # noqa: BLE001
                if not self._is_closing:
                    _log.error(
                        "the gRPC server ended by itself and is started again: %s", type(error).__name__
                    )
                    await self._restart()
                    continue
            return

    async def close_gracefully(self) -> None:
        """Close the server once every caller has disconnected, or after a second.

        The servicer must refuse RPCs meanwhile.
        """
        connections = self._listeners.connections
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCONNECT_GRACE_SECONDS):
                # No event reports the end of a connection.
                while await asyncio.to_thread(connections.count):  # noqa: ASYNC110
                    await asyncio.sleep(_CONNECTION_POLL_SECONDS)
        await self.close()

    async def close(self) -> None:
        """Close the server at once. RPCs in progress end with UNAVAILABLE, as their connection is closed."""
        self._is_closing = True
        await self._terminate()

    async def _restart(self) -> None:
        await self._terminate()
        self._server = self._bind_new_server()
        await self._server.start()

    async def _terminate(self) -> None:
        connections = self._listeners.connections
        connections.stop_accepting()
        # A connection that the kernel had already accepted becomes one of the server's only now, so that one
        # round is not enough.
        for _ in range(_CLOSE_ROUNDS):
            connections.close_all()
            await asyncio.sleep(_CLOSE_INTERVAL_SECONDS)
        connections.close_all()
        await self._server.stop(0)

    def _bind_new_server(self) -> aio.Server:
        server = self._make_server()
        self._listeners.add_to(server)
        return server


def bind_server(
    settings: ServerSettings, service: GrpcService, *, credentials: CredentialsFactory | None = None
) -> GrpcServer:
    """Bind every address. Raise CommandError that names an address that cannot be bound, and the reason."""
    args = _channel_args(settings)
    health = Health()
    limiter = InboundLimiter(InboundLimits.for_max_request(settings.max_request_bytes))

    def make_server() -> aio.Server:
        server = unknown_methods.create_server(args)
        service.add_to(server)
        registrar: Any = BoundedServiceRegistrar(server, limiter)
        health_pb2_grpc.add_HealthServicer_to_server(health, registrar)
        reflection.add_to(registrar)
        return server

    return GrpcServer(make_server, listeners=Listeners(settings, credentials), health=health)


def _channel_args(settings: ServerSettings) -> list[tuple[str, int]]:
    age_ms = _to_milliseconds(settings.max_connection_age_seconds)
    listener_count = len(settings.listen) + len(settings.listen_plaintext)
    return [
        # A second proxy on the same port is a mistake, and must not share its connections.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", min(settings.max_request_bytes, _INT_MAX)),
        ("grpc.max_send_message_length", -1),
        *((("grpc.max_connection_age_ms", age_ms),) if age_ms else ()),
        # As long as the longest RPC, so that a connection that reaches its age still completes its RPCs.
        ("grpc.max_connection_age_grace_ms", _to_milliseconds(settings.max_wait_seconds)),
        *channel_args.server_args(listener_count=listener_count),
    ]


def _to_milliseconds(seconds: float) -> int:
    return int(min(seconds * 1000, _INT_MAX))
