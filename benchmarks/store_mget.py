"""A baseline server: MGET on string keys by redis-py, with the generated classes."""

import asyncio
import sys

import redis.asyncio
import uvloop
from grpc import aio

from benchmarks.store_server import digest, string_key
from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc
from services.cache_proxy.config.server_settings import ServerSettings
from services.cache_proxy.rpc import server
from services.common import logs


class MgetProxy(seniority_pb2_grpc.SeniorityModelServicer):
    """A server with the proxy's digests, server options and event loop. Requested pairs must be stored."""

    def __init__(self, client: "redis.asyncio.Redis") -> None:
        self._client = client

    async def InferSeniority(  # noqa: N802 - the contract's name
        self,
        request: pb.SeniorityRequestBatch,
        context: aio.ServicerContext[pb.SeniorityRequestBatch, pb.SeniorityResponseBatch],  # noqa: ARG002
    ) -> pb.SeniorityResponseBatch:
        """Look up all pairs."""
        keys = [string_key(digest(item.company, item.title)) for item in request.batch]
        values = await self._client.mget(keys)
        return pb.SeniorityResponseBatch(
            batch=[
                pb.SeniorityResponse(uuid=item.uuid, seniority=int(value or 0))
                for item, value in zip(request.batch, values, strict=True)
            ]
        )

    def add_to(self, server: aio.Server) -> None:
        """Register the service with `server`."""
        seniority_pb2_grpc.add_SeniorityModelServicer_to_server(self, server)


async def _serve(url: str) -> None:
    front = server.bind_server(
        ServerSettings(listen=("127.0.0.1:0",)), MgetProxy(redis.asyncio.Redis.from_url(url))
    )
    await front.start()
    logs.announce_ready(listen=front.addresses)
    await front.run()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(sys.argv[1]))
