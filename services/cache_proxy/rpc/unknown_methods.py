"""A server that survives an RPC to a method that it does not have.

gRPC 1.84 to 1.85.3 at least decode the name of such a method in the loop that accepts all RPCs: a name that
is not UTF-8 ends that loop, and with it the server, in a process that goes on and looks healthy. All our
methods, health and reflection too, are registered with gRPC's core, which tells them apart by bytes. So every
other method is refused here, whatever its name.

This uses the inside of grpcio, and only where that is as it is known. Elsewhere the public server is used,
and `GrpcServer` starts it again when it has ended. `test_newest_grpcio.py` tries the newest release.
"""

import asyncio
import logging
from contextlib import suppress
from functools import cache
from typing import Any

import grpc
from grpc import aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # it has no types

_log = logging.getLogger(__name__)

ChannelArgs = list[tuple[str, int]]


def create_server(options: ChannelArgs) -> aio.Server:
    """As `aio.server`."""
    made = aio.server(options=options)
    inside: Any = made
    try:
        inside._server = _create_guarded_server(inside._loop, options)  # noqa: SLF001 - no other way in
    except (AttributeError, TypeError):
        _warn_once()
    return made


@cache
def _warn_once() -> None:
    _log.warning(
        "grpcio %s is not known inside: an RPC to a method whose name is not UTF-8 restarts the server",
        grpc.__version__,
    )


def _create_guarded_server(loop: Any, options: ChannelArgs) -> Any:
    """Raise AttributeError or TypeError where grpcio is not as it is known."""
    arguments = (loop, None, (), (), tuple(options), None)
    try:
        return _guarded_class()(*arguments)
    except TypeError:
        return _guarded_class()(*arguments, False)  # noqa: FBT003 - without xDS, in releases that ask


@cache
def _guarded_class() -> Any:
    abort_error, batch_error = cygrpc.AbortError, cygrpc.ExecuteBatchError
    make_context = cygrpc._ServicerContext  # noqa: SLF001
    _ = cygrpc.AioServer._request_call  # noqa: SLF001 - it must be there to be replaced

    async def refuse(context: Any) -> None:
        with suppress(abort_error, batch_error):  # how each abort ends; the caller is gone
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    class Guarded(cygrpc.AioServer):  # type: ignore[misc]
        """State: `_refusing`, the RPCs that are being refused; asyncio itself does not keep their tasks."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._refusing: set[asyncio.Task[None]] = set()

        async def _request_call(self) -> Any:
            """Wait for RPCs to methods that are not registered. gRPC's own loop never gets one."""
            while True:
                state = await super()._request_call()
                refusal = asyncio.create_task(
                    refuse(make_context(state, None, None, asyncio.get_running_loop()))
                )
                self._refusing.add(refusal)
                refusal.add_done_callback(self._refusing.discard)

    return Guarded
