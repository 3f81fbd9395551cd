"""A gRPC channel that follows reloaded certificates and changed addresses of its target."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Self

import grpc
from grpc import aio

from services.common.file_reload import ReloadingFile
from services.common.grpc_target import http_proxy_options, http_proxy_variable
from services.common.tasks import cancel_and_wait
from services.common.tls import PemBundle

_CONNECT_TIMEOUT_SECONDS = 5.0
_RECONNECT_AFTER_SECONDS = 2.0
_log = logging.getLogger(__name__)

DNS_REFRESH_OPTIONS = (
    # By default core queries DNS at most once in 30 s, however often it cannot connect.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # How long one attempt to connect may take, 20 s by default. Core queries DNS only after it has failed.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
"""Channel arguments that find a server with a new address within seconds."""


class ReloadingChannel:
    """A channel to `target`: plaintext, or with the TLS files in `tls`.

    gRPC can change a client certificate only by a new channel. The new channel takes over once it is
    connected, so that no call waits for a handshake. Calls on the old channel have `max_call_seconds` to end.

    While a name has no address, core's resolver waits longer after each failure, up to two minutes. So a
    channel without a connection is replaced every two seconds: a new resolver queries DNS at once.

    State: `_current`, opened at `_opened_at`; `_used_pem`, the content of the TLS files that it is made with,
    or will be; `_background_tasks`, which replace channels and close old ones.
    """

    def __init__(
        self,
        target: str,
        *,
        tls: ReloadingFile[PemBundle] | None,
        options: Sequence[tuple[str, Any]],
        max_call_seconds: float,
    ) -> None:
        if variable := http_proxy_variable(target):
            _log.info(
                "%s is set: calls to %s go through that proxy, unless no_grpc_proxy or no_proxy names it",
                variable,
                target,
            )
        self._target = target
        self._tls = tls
        self._options = (*DNS_REFRESH_OPTIONS, *options, *http_proxy_options(target))
        self._max_call_seconds = max_call_seconds
        self._used_pem = None if tls is None else tls.value
        self._current = self._open_channel(self._used_pem)
        self._opened_at = time.monotonic()
        self._background_tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Return the channel."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channel."""
        await self.close()

    @property
    def current(self) -> aio.Channel:
        """Return the channel for a call that is made at once. It connects when it is first used."""
        return self._current

    def refresh(self) -> None:
        """Replace the channel if its files changed or its connection is lost.

        Call this before an RPC, or every second.
        """
        if self._tls is not None:
            self._tls.reload_if_changed()
            if self._tls.value != self._used_pem:
                self._used_pem = self._tls.value
                self._run_in_background(self._replace_channel(self._used_pem))
                return
        state = self._current.get_state(try_to_connect=True)
        is_lost = state is grpc.ChannelConnectivity.TRANSIENT_FAILURE
        if is_lost and time.monotonic() - self._opened_at >= _RECONNECT_AFTER_SECONDS:
            lost, self._current = self._current, self._open_channel(self._used_pem)
            self._opened_at = time.monotonic()
            self._current.get_state(try_to_connect=True)
            self._run_in_background(lost.close(self._max_call_seconds))

    async def close(self) -> None:
        """Close the channel and the channels that it replaced."""
        if self._background_tasks:
            await cancel_and_wait(self._background_tasks)
        await self._current.close()

    def _run_in_background(self, change: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(change)
        self._background_tasks.add(task)
        task.add_done_callback(self._background_tasks.discard)

    async def _replace_channel(self, pem: PemBundle) -> None:
        fresh = self._open_channel(pem)
        closing, grace_seconds = fresh, 0.0
        try:
            # A server that cannot be reached by then will soon be unreachable by the old channel, too.
            with suppress(TimeoutError):
                async with asyncio.timeout(_CONNECT_TIMEOUT_SECONDS):
                    await fresh.channel_ready()
            # Otherwise the files have changed once more meanwhile.
            if pem == self._used_pem:
                closing, grace_seconds = self._current, self._max_call_seconds
                self._current = fresh
                self._opened_at = time.monotonic()
            await closing.close(grace_seconds)
        except asyncio.CancelledError:
            await closing.close()
            raise

    def _open_channel(self, pem: PemBundle | None) -> aio.Channel:
        if pem is None:
            return aio.insecure_channel(self._target, options=self._options)
        return aio.secure_channel(self._target, pem.channel_credentials(), options=self._options)
