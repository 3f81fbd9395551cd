"""`grpc.health.v1.Health`, with the method that gRPC's own servicer lacks."""

from typing import Any

from grpc_health.v1 import health_pb2
from grpc_health.v1._async import HealthServicer


class Health(HealthServicer):
    """`Check`, `Watch` and `List`."""

    async def List(self, _request: object, _context: object) -> Any:  # noqa: N802 - the protocol's name
        """Return the status of every service: overall, which has no name, and the model's."""
        messages: Any = health_pb2  # the types lack what List takes and returns
        inside: Any = self
        return messages.HealthListResponse(
            statuses={
                name: messages.HealthCheckResponse(status=status)
                for name, status in inside._server_status.items()  # noqa: SLF001 - the types do not know it
            }
        )
