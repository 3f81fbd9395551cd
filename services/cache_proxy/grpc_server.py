"""The gRPC server: the model's interface, health and reflection on every `--listen` address."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.cache_proxy import http2_bounds, known_methods, reflection
from services.cache_proxy.config import ServerSettings
from services.cache_proxy.connections import Connections
from services.cache_proxy.health import Health
from services.cache_proxy.intake import Intake, IntakeLimits
from services.cache_proxy.open_services import OpenServices
from services.cache_proxy.servicer import SERVICE_NAME
from services.cache_proxy.unix_socket import SocketPath
from services.common.errors import CommandError

_HOUR_SECONDS = 3600.0
_INT_MAX = 2**31 - 1  # of a channel argument; as a number of milliseconds, 24 days
_LEAVING_SECONDS = 1.0
_COUNT_EVERY_SECONDS = 0.1


class Service(Protocol):
    """What answers on the model's interface."""

    def add_to(self, server: aio.Server) -> None:
        """Serve on `server`."""


@dataclass(frozen=True, slots=True)
class GrpcServer:
    """A server that is bound but not yet started, its health, and the addresses that it really has."""

    server: aio.Server
    health: Health
    bound: list[str]
    paths: list[SocketPath]  # held for as long as this is
    connections: Connections = field(default_factory=Connections)

    async def start(self) -> None:
        """Begin to answer, as SERVING."""
        await self.server.start()
        for name in ("", SERVICE_NAME):
            await self.health.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def ended(self) -> None:
        """Return when it was stopped. Raises what it ended of by itself: gRPC would only log that."""
        # Without a timeout, a cancellation here would also cancel what `stop` waits for.
        while await self.server.wait_for_termination(_HOUR_SECONDS):
            pass

    async def finish(self) -> None:
        """End once every caller has left, or after a second. The service refuses what arrives meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVING_SECONDS):
                while await asyncio.to_thread(self.connections.count):  # noqa: ASYNC110 - no event says it
                    await asyncio.sleep(_COUNT_EVERY_SECONDS)
        await self.close()

    async def close(self) -> None:
        """End at once: RPCs under way end as UNAVAILABLE, because their connection is closed."""
        self.connections.shut()
        stopping = asyncio.ensure_future(self.server.stop(0))
        await asyncio.sleep(0)  # now it accepts no connection any more
        self.connections.shut()
        await stopping


def listen(
    settings: ServerSettings,
    service: Service,
    *,
    credentials: Callable[[], grpc.ServerCredentials] | None = None,
) -> GrpcServer:
    """Bind every address, all but Unix sockets with `credentials` of its own if there are any.

    Raises CommandError naming the address that cannot be had.
    """
    age_ms = _milliseconds(settings.max_connection_age_seconds)
    options = [
        ("grpc.so_reuseport", 0),  # a second proxy on the port is a mistake, not a helper
        ("grpc.max_receive_message_length", min(settings.max_request_bytes, _INT_MAX)),
        ("grpc.max_send_message_length", -1),
        *((("grpc.max_connection_age_ms", age_ms),) if age_ms else ()),
        # No shorter than the longest RPC: a connection that is of age still answers what it was asked.
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.max_wait_seconds)),
        *http2_bounds.options(listeners=len(settings.listen)),
    ]
    paths = [SocketPath(address) for address in settings.listen if address.startswith("unix:")]
    server = known_methods.server(options)
    health = Health()
    service.add_to(server)
    open_services: Any = OpenServices(server, Intake(IntakeLimits.of(settings.max_request_bytes)))
    health_pb2_grpc.add_HealthServicer_to_server(health, open_services)
    reflection.add_to(open_services)
    connections = Connections()
    with connections.found():
        bound = [_bind(server, address, credentials) for address in settings.listen]
    return GrpcServer(server, health, bound, paths, connections)


def _milliseconds(seconds: float) -> int:
    return int(min(seconds * 1000, _INT_MAX))


def _bind(server: aio.Server, address: str, credentials: Callable[[], grpc.ServerCredentials] | None) -> str:
    in_the_clear = credentials is None or address.startswith("unix:")
    try:
        if in_the_clear or credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials())
    except RuntimeError as error:
        unless = "" if in_the_clear else ", or --tls-cert is of a kind that gRPC does not know"
        message = f"--listen {address}: the address cannot be used (taken, or not this host's{unless})"
        raise CommandError(message) from error
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
