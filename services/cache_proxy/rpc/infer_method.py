"""Register the InferSeniority method with a handler that works on bytes."""

from collections.abc import Awaitable, Callable

import grpc
from grpc import aio

from protos import seniority_pb2
from services.cache_proxy.auth.caller import Context

SERVICE_NAME = seniority_pb2.DESCRIPTOR.services_by_name["SeniorityModel"].full_name


def register_infer(server: aio.Server, infer: Callable[[object, Context], Awaitable[bytes]]) -> None:
    """Register `infer` as the handler of InferSeniority, like generated code does but from bytes to bytes.

    It is registered with a stream of requests, which looks the same on the wire. `InboundLimiter` then
    decides what is read.
    """
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_unary_rpc_method_handler(infer)
    server.add_registered_method_handlers(SERVICE_NAME, {"InferSeniority": handler})
