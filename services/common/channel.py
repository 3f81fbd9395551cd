"""A channel whose certificates are renewed while it is in use."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from grpc import aio

from services.common.endings import end
from services.common.renewal import Renewed
from services.common.targets import http_proxy_options
from services.common.tls import Pem

_CONNECTING_SECONDS = 5.0


class RenewedChannel:
    """A channel to `target`: in the clear, or by the TLS that the files hold.

    gRPC knows no other way to change a client's certificate than another channel. It takes over once it is
    connected, so that no call waits for a handshake; a call on the one before may take `longest_call_seconds`
    to end.

    State: `_current`; `_used`, what the files held that it is made with, or is to be; `_changes`, the tasks
    that replace it and close what was replaced.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: Renewed[Pem] | None,
        options: Sequence[tuple[str, Any]],
        longest_call_seconds: float,
    ) -> None:
        self._target = target
        self._tls = tls
        self._options = [*options, *http_proxy_options(target)]
        self._longest_call_seconds = longest_call_seconds
        self._used = None if tls is None else tls.value
        self._current = self._open(self._used)
        self._changes: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Nothing happens yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    @property
    def current(self) -> aio.Channel:
        """For the next call, which must be made at once; it connects when it is first used."""
        return self._current

    def renew(self) -> None:
        """Look at the files, and go by what they hold now if it is something else."""
        if self._tls is None:
            return
        self._tls.look()
        if self._tls.value == self._used:
            return
        self._used = self._tls.value
        change = asyncio.create_task(self._replace(self._used))
        self._changes.add(change)
        change.add_done_callback(self._changes.discard)

    async def close(self) -> None:
        """Close it, and what it replaced."""
        if self._changes:
            await end(self._changes)
        await self._current.close()

    async def _replace(self, pem: Pem) -> None:
        fresh = self._open(pem)
        closing, grace_seconds = fresh, 0.0
        try:
            # Whoever cannot be reached by then could not be reached by the old way either, before long.
            with suppress(TimeoutError):
                async with asyncio.timeout(_CONNECTING_SECONDS):
                    await fresh.channel_ready()
            if pem == self._used:  # else they were renewed once more meanwhile
                closing, grace_seconds = self._current, self._longest_call_seconds
                self._current = fresh
            await closing.close(grace_seconds)
        except asyncio.CancelledError:
            await closing.close()
            raise

    def _open(self, pem: Pem | None) -> aio.Channel:
        if pem is None:
            return aio.insecure_channel(self._target, options=self._options)
        return aio.secure_channel(self._target, pem.channel_credentials(), options=self._options)
