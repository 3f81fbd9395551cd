"""A channel that follows its target: renewed certificates, and a name whose address changes."""

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
    # Core asks DNS once in 30 s at most, however often it cannot connect.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # How long one attempt to connect may take, 20 s by default. Core asks DNS again only after it has failed.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
"""Channel arguments with which a server that moves to another address is found within seconds."""


class ReloadingChannel:
    """A channel to `target`: in the clear, or by the TLS that the files hold.

    gRPC knows no other way to change a client's certificate than another channel. It takes over once it is
    connected, so that no call waits for a handshake; a call on the one before may take `longest_call_seconds`
    to end.

    While a name has no address, core's resolver waits longer after each failure, up to two minutes. A channel
    that has no connection is therefore replaced every two seconds: another resolver asks DNS at once.

    State: `_current`, opened at `_opened_at`; `_used`, what the files held that it is made with, or is to be;
    `_changes`, the tasks that replace it and close what was replaced.
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
        """Nothing happens yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    @property
    def current(self) -> aio.Channel:
        """For the next call, which must be made at once; it connects when it is first used."""
        return self._current

    def refresh(self) -> None:
        """Follow the target: call it before an RPC, or every second.

        Read the files, and use what they hold now if it is something else. Resolve the name again if there is
        no connection.
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
        """Close it, and what it replaced."""
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
            # Whoever cannot be reached by then could not be reached by the old way either, before long.
            with suppress(TimeoutError):
                async with asyncio.timeout(_CONNECT_TIMEOUT_SECONDS):
                    await fresh.channel_ready()
            if pem == self._used_pem:  # else they were renewed once more meanwhile
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
