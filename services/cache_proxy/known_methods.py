"""A server that lives when an RPC asks for a method that is none.

gRPC 1.84 to 1.85.3 at least read the name of such a method in the loop that takes all RPCs: one whose name is
not UTF-8 ended that loop, and with it the server, in a process that went on and looked healthy. All our
methods, health and reflection too, are registered with gRPC's core, which tells them apart by bytes. So
whatever else is called is refused here, by whatever name.
"""

import asyncio
from contextlib import suppress
from typing import Any

import grpc
from grpc import aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # it has no types


def server(options: list[tuple[str, int]]) -> aio.Server:
    """As `aio.server`."""
    made = aio.server(options=options)
    inside: Any = made
    inside._server = _Core(inside._loop, None, (), (), tuple(options), None)  # noqa: SLF001 - no other way in
    return made


class _Core(cygrpc.AioServer):  # type: ignore[misc]
    """State: `_refusing`, the RPCs that are being refused; asyncio itself does not keep their tasks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._refusing: set[asyncio.Task[None]] = set()

    async def _request_call(self) -> Any:
        """The next RPC to no registered method: none for gRPC's own loop, ever."""
        while True:
            state = await super()._request_call()
            context = cygrpc._ServicerContext(state, None, None, asyncio.get_running_loop())  # noqa: SLF001
            refusal = asyncio.create_task(_refuse(context))
            self._refusing.add(refusal)
            refusal.add_done_callback(self._refusing.discard)


async def _refuse(context: Any) -> None:
    with suppress(cygrpc.AbortError, cygrpc.ExecuteBatchError):  # how each abort ends; the caller is gone
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
