"""A gRPC server that survives an RPC to an unknown method.

At least gRPC 1.84 to 1.85.3 decode the name of an unknown method in the loop that accepts all RPCs. A name
that is not UTF-8 ends that loop, and with it the server, in a process that goes on and looks healthy. All
methods of the proxy, health and reflection too, are registered with gRPC's core, which compares their names
as bytes. So every other method is refused here, whatever its name.

This uses private parts of grpcio, and only where they are as expected. Otherwise the public server is used,
and `GrpcServer` restarts it when it has ended. `test_unknown_methods.py` tests the newest release.
"""

import asyncio
import logging
from contextlib import suppress
from functools import cache
from typing import Any

import grpc
from grpc import aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

_log = logging.getLogger(__name__)

ChannelArgs = list[tuple[str, int]]


def create_server(args: ChannelArgs) -> aio.Server:
    """Return a server like `aio.server` does, but one that an unknown method does not end."""
    server = aio.server(options=args)
    private: Any = server
    try:
        private._server = _create_guarded_server(private._loop, args)  # noqa: SLF001
    except (AttributeError, TypeError):
        _warn_once()
    return server


@cache
def _warn_once() -> None:
    _log.warning(
        "grpcio %s is not known inside: an RPC to a method whose name is not UTF-8 restarts the server",
        grpc.__version__,
    )


def _create_guarded_server(loop: Any, args: ChannelArgs) -> Any:
    """Return grpcio's inner server. Raise AttributeError or TypeError where grpcio is not as expected."""
    arguments = (loop, None, (), (), tuple(args), None)
    try:
        return _guarded_server_class()(*arguments)
    except TypeError:
        # Some releases have one more argument: whether to use xDS.
        return _guarded_server_class()(*arguments, False)  # noqa: FBT003


@cache
def _guarded_server_class() -> Any:
    """Return a subclass of grpcio's inner server. Raise AttributeError where grpcio is not as expected."""
    abort_error = cygrpc.AbortError
    batch_error = cygrpc.ExecuteBatchError
    make_context = cygrpc._ServicerContext  # noqa: SLF001
    # The method that is overridden must exist.
    _ = cygrpc.AioServer._request_call  # noqa: SLF001

    async def refuse(context: Any) -> None:
        # Every abort ends with the first error, or with the second if the caller is gone.
        with suppress(abort_error, batch_error):
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    class GuardedServer(cygrpc.AioServer):  # type: ignore[misc]
        """A server that refuses unknown methods without decoding their names.

        State: `_refusals`, the tasks that refuse RPCs, since asyncio keeps only weak references to tasks.
        """

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self._refusals: set[asyncio.Task[None]] = set()

        async def _request_call(self) -> Any:
            """Wait for RPCs to unregistered methods, and return none of them to grpcio's loop."""
            while True:
                state = await super()._request_call()
                refusal = asyncio.create_task(
                    refuse(make_context(state, None, None, asyncio.get_running_loop()))
                )
                self._refusals.add(refusal)
                refusal.add_done_callback(self._refusals.discard)

    return GuardedServer
