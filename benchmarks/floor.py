"""A baseline server: `grpc.aio` with the generated classes, and the proxy's channel options and event loop.

It answers a constant without any lookup. It also serves as the model where a cache has to be filled.
"""

import asyncio

import uvloop
from grpc import aio

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc
from services.cache_proxy.config.server_settings import ServerSettings
from services.cache_proxy.rpc import server
from services.common import logs

LEVEL = 4


class Floor(seniority_pb2_grpc.SeniorityModelServicer):
    """The straightforward implementation."""

    async def InferSeniority(  # noqa: N802 - the contract's name
        self,
        request: pb.SeniorityRequestBatch,
        context: aio.ServicerContext[pb.SeniorityRequestBatch, pb.SeniorityResponseBatch],  # noqa: ARG002
    ) -> pb.SeniorityResponseBatch:
        """Return the constant level for every pair."""
        return pb.SeniorityResponseBatch(
            batch=[pb.SeniorityResponse(uuid=item.uuid, seniority=LEVEL) for item in request.batch]
        )

    def add_to(self, server: aio.Server) -> None:
        """Register the service with `server`."""
        seniority_pb2_grpc.add_SeniorityModelServicer_to_server(self, server)


async def _serve() -> None:
    front = server.bind_server(ServerSettings(listen=("127.0.0.1:0",)), Floor())
    await front.start()
    logs.announce_ready(listen=front.addresses)
    await front.run()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
