"""Health and reflection: open to everybody, token or not, so no more is read of anybody than they need.

gRPC itself would read messages as large as those of pairs, as many as there are streams, and a health watch
keeps the name that it was given for as long as it lasts.
"""

from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from services.cache_proxy.errors import QueueFullError
from services.cache_proxy.rpc.inbound_limiter import InboundLimiter

_MAX_MESSAGE_BYTES = 4096  # a service's name, a symbol, or a file's


class BoundedServiceRegistrar:
    """What generated code takes for a server: it adds each method to the real one, its messages bounded.

    `intake` is theirs alone: who may not call takes no place of those who may.
    """

    def __init__(self, server: Any, intake: InboundLimiter) -> None:
        self._server = server
        self._limiter = intake

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """They are registered as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Add them, as of streams of bytes, which is the same on the wire."""
        bounded = {name: self._bound_handler(handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, bounded)

    def _bound_handler(self, handler: Any) -> Any:
        async def one(_messages: object, context: Any) -> Any:
            message = await self._read(handler, context)
            if message is None:
                await _abort(context, grpc.StatusCode.INTERNAL, "no request came")
            return await (handler.unary_unary or handler.unary_stream)(message, context)

        async def many(_messages: object, context: Any) -> AsyncIterator[Any]:
            async for answer in handler.stream_stream(self._read_all(handler, context), context):
                yield answer

        if handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(one, None, handler.response_serializer)
        serve = many if handler.request_streaming else one
        return grpc.stream_stream_rpc_method_handler(serve, None, handler.response_serializer)

    async def _read_all(self, handler: Any, context: Any) -> AsyncIterator[Any]:
        while (message := await self._read(handler, context)) is not None:
            yield message

    async def _read(self, handler: Any, context: Any) -> Any:
        """None: there is none, or no more."""
        try:
            message = await self._limiter.read(context)
        except QueueFullError as error:
            await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)
        if message is None:
            return None
        if len(message) > _MAX_MESSAGE_BYTES:
            await _abort(
                context, grpc.StatusCode.INVALID_ARGUMENT, f"it has more than {_MAX_MESSAGE_BYTES} bytes"
            )
        try:
            return handler.request_deserializer(message)
        except DecodeError:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "it is no message of this method")


async def _abort(context: Any, code: grpc.StatusCode, words: str) -> NoReturn:
    await context.abort(code, words)
    raise AssertionError  # abort never returns
