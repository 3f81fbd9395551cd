"""Register health and reflection with a limit on the size of their messages.

Both are open to every caller, with or without a token, so no more is read than they need. gRPC itself would
read messages as large as those of pairs, as many as there are streams, and a health watch keeps the service
name that it received for as long as it lasts.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from services.cache_proxy.errors import QueueFullError
from services.cache_proxy.rpc.inbound_limiter import InboundLimiter

# Enough for the name of a service, a symbol or a file.
_MAX_MESSAGE_BYTES = 4096


class BoundedServiceRegistrar:
    """Add the methods of generated services to a server, with a limit on the size of their messages.

    Generated code takes it for the server.

    `limiter` must be separate from that of the model's interface, so that callers without a token cannot take
    the capacity of callers with one.
    """

    def __init__(self, server: Any, limiter: InboundLimiter) -> None:
        self._server = server
        self._limiter = limiter

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Do nothing: generated code registers the same methods by name as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add the methods as streams of bytes, which look the same on the wire."""
        bounded = {name: self._bound_handler(handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, bounded)

    def _bound_handler(self, handler: Any) -> Any:
        async def serve_one(_messages: object, context: Any) -> Any:
            message = await self._read(handler, context)
            if message is None:
                await _abort(context, grpc.StatusCode.INTERNAL, "no request came")
            return await (handler.unary_unary or handler.unary_stream)(message, context)

        async def serve_stream(_messages: object, context: Any) -> AsyncIterator[Any]:
            async for response in handler.stream_stream(self._read_all(handler, context), context):
                yield response

        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(serve_one, None, handler.response_serializer)
        serve = serve_stream if handler.request_streaming else serve_one
        return grpc.stream_stream_rpc_method_handler(serve, None, handler.response_serializer)

    async def _read_all(self, handler: Any, context: Any) -> AsyncIterator[Any]:
        while (message := await self._read(handler, context)) is not None:
            yield message

    async def _read(self, handler: Any, context: Any) -> Any:
        """Return the next message, None if there is none. End the RPC if it is too large, slow or invalid."""
        try:
            message = await self._limiter.read(context)
        except QueueFullError as error:
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)
        if message is None:
            return None
        if len(message) > _MAX_MESSAGE_BYTES:
            text = f"it has more than {_MAX_MESSAGE_BYTES} bytes"
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, text)
        try:
            return handler.request_deserializer(message)
        except DecodeError:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "it is no message of this method")


async def _abort(context: Any, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
    # gRPC's abort always raises.
    raise AssertionError
