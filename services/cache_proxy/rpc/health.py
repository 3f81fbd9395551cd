"""`grpc.health.v1.Health`, with the method that gRPC's servicer lacks."""

from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer


class Health(HealthServicer):
    """`Check`, `Watch` and `List`."""

    # The protocol's method name.
    async def List(self, _request: object, _context: object) -> Any:  # noqa: N802
        """Return the status of every service: the server as a whole, which has no name, and the model's."""
        # The type stubs have neither List's messages nor the attribute with the statuses.
        messages: Any = health_pb2
        private: Any = self
        return messages.HealthListResponse(
            statuses={
                name: messages.HealthCheckResponse(status=status)
                for name, status in private._server_status.items()  # noqa: SLF001
            }
        )
