"""Runs the queue's Lua scripts, each of which is one decision, and repeats or resets where that helps."""

import asyncio
import itertools
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from redis.exceptions import AskError, NoScriptError, ReadOnlyError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.errors import (
    QueueFormatError,
    StoreAccessDeniedError,
    StoreDamagedError,
    StoreError,
)
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import is_access_denied
from services.cache_proxy.redis_client.lua_script import Script
from services.cache_proxy.redis_client.node import QueueNode
from services.cache_proxy.redis_keys import QueueKeys

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "lua"
_NAMES = (
    "enqueue",
    "cancel",
    "claim",
    "postpone_slot",
    "release",
    "complete",
    "fail",
    "reject",
    "heartbeat",
    "set_peer_state",
    "snapshot",
    "configure",
    "reset",
    "standby",
)
_OPERATIONS = {
    "cancel": "leave",
    "postpone_slot": "late",
    "release": "put_back",
    "complete": "fulfil",
    "reject": "refuse",
    "set_peer_state": "verdict",
    "snapshot": "overview",
    "reset": "repair",
}
"""Values of the metric label `op`, which dashboards rely on, of scripts that have another name."""
_MAX_ATTEMPTS = 4
_MAX_CONCURRENT_CALLS = 8

# A Cluster's hash slot with few keys is moved in less time than this.
_SLOT_MIGRATION_SECONDS = 0.5
_SLOT_MIGRATION_RETRY_SECONDS = 0.02

# Texts in the error of a script that data in Redis caused: Lua's errors, and those of commands for numbers.
# Any other error comes from the server's state. A reset would not repair that, and would delete the queue of
# all replicas.
_DATA_ERRORS = (
    "WRONGTYPE",
    "attempt to ",
    "bad argument",
    "not an integer",
    "not a valid float",
    "would overflow",
    "would produce NaN",
    "too many results to unpack",
    "Bad data format",
    "Missing bytes in input",
)
_OTHER_FORMAT = re.compile(r"QUEUEFORMAT (\d{1,4})")
_DENIED_COMMAND = re.compile(r"the '([^']{1,60})' command")


class Scripts:
    """Runs scripts by name.

    Every script may run twice with the same arguments, so it is repeated if its reply was lost. If a script
    fails on data in Redis, the queue is reset, and all replicas enqueue their pairs again. It is not reset
    again for the same script, nor while no script succeeds, since that would not repair it.

    State, touched only from the event loop:

    - `_reset_for`: the script whose failure led to the last reset, until that script succeeds.
    - `_has_script_succeeded`: whether any script has succeeded since.
    - `_resets`: the number of resets.
    """

    def __init__(self, node: QueueNode, keys: QueueKeys, *, metrics: ProxyMetrics) -> None:
        prelude = (_FOLDER / "prelude.lua").read_text()
        self._scripts = {
            name: Script(_header(name, keys.format) + prelude + (_FOLDER / f"{name}.lua").read_text())
            for name in _NAMES
        }
        self._node = node
        self._format = keys.format
        self.channel = keys.channel(node.database)
        self._keys = [keys.limit, keys.base, self.channel, keys.model, keys.invalidations]
        self.model_key = keys.model
        self._metrics = metrics
        self._call_slots = asyncio.Semaphore(_MAX_CONCURRENT_CALLS)
        self._reset_for: str | None = None
        self._has_script_succeeded = True
        self._resets = 0
        self._reset_lock = asyncio.Lock()

    @property
    def on_cluster(self) -> bool:
        """Return whether the queue is on one node of several."""
        return self._node.is_cluster

    async def run(self, name: str, args: Sequence[Any]) -> Any:
        """Run a script, and return its reply. Raises `StoreError` if no attempt brought one."""
        async with self._call_slots:
            known_resets = self._resets
            try:
                return await self._run(name, args)
            except StoreError as error:
                if not _is_data_error(error.__cause__):
                    raise
                await self._reset_once(name, error, known_resets=known_resets)
            try:
                return await self._run(name, args)
            except StoreError as error:
                if _is_data_error(error.__cause__):
                    raise StoreDamagedError(str(error)) from error
                raise

    async def _reset_once(self, name: str, error: StoreError, *, known_resets: int) -> None:
        """Reset the queue, unless another script did so since there were `known_resets`.

        Several scripts may find the same damage at once. Raises `StoreError`.
        """
        async with self._reset_lock:
            if self._resets != known_resets:
                return
            if self._reset_for is not None and (self._reset_for == name or not self._has_script_succeeded):
                raise StoreDamagedError(str(error)) from error
            self._reset_for = name
            self._has_script_succeeded = False
            _log.warning("the queue in Redis is damaged and is reset: %s", error)
            self._metrics.store_garbage.inc()
            await self._run("reset", [])
            self._resets += 1

    async def _run(self, name: str, args: Sequence[Any]) -> Any:
        script = self._scripts[name]
        command = ("EVALSHA", script.sha)
        migration_deadline = time.monotonic() + _SLOT_MIGRATION_SECONDS
        for attempt in itertools.count(1):
            try:
                with self._metrics.store_duration.labels(_OPERATIONS.get(name, name)).time():
                    reply = await self._node.command(*command, len(self._keys), *self._keys, *args)
            except StoreError as error:
                command = await self._next_attempt(
                    name, command, error, attempt=attempt, migration_deadline=migration_deadline
                )
            else:
                if self._reset_for == name:
                    self._reset_for = None
                self._has_script_succeeded = self._has_script_succeeded or name != "reset"
                return reply
        raise AssertionError

    async def _next_attempt(
        self,
        name: str,
        command: tuple[str, str],
        error: StoreError,
        *,
        attempt: int,
        migration_deadline: float,
    ) -> tuple[str, str]:
        """Return the command for the next attempt, or raise the error if another one is of no use."""
        cause = error.__cause__
        other_format = _OTHER_FORMAT.search(str(cause))
        if other_format:
            raise QueueFormatError(found=int(other_format[1]), expected=self._format)
        if isinstance(cause, AskError | TryAgainError) and time.monotonic() < migration_deadline:
            # The script did not run. Soon it can, on the node to which the slot is moved.
            await asyncio.sleep(_SLOT_MIGRATION_RETRY_SECONDS)
            return command
        if is_access_denied(cause or error):
            raise self._access_error(name, error) from cause
        if isinstance(cause, ReadOnlyError):
            await self._node.drop_connections()
        elif not isinstance(cause, NoScriptError) and not self._is_retryable(cause, attempt):
            raise _with_script_name(name, error) from cause
        if attempt >= _MAX_ATTEMPTS:
            raise _with_script_name(name, error) from cause
        return ("EVAL", self._scripts[name].text) if isinstance(cause, NoScriptError) else command

    def _access_error(self, name: str, error: StoreError) -> StoreAccessDeniedError:
        found = _DENIED_COMMAND.search(str(error))
        command = found[1].lower() if found else name
        return StoreAccessDeniedError(command=command, user=self._node.user, reason=str(error))

    def _is_retryable(self, cause: BaseException | None, attempt: int) -> bool:
        """Return whether only the reply or the connection was lost.

        A timeout is retried once. Outside of a Cluster the client has done that already.
        """
        if isinstance(cause, RedisTimeoutError | TimeoutError):
            return self._node.is_cluster and attempt == 1
        return isinstance(cause, RedisConnectionError | OSError)


def _header(name: str, queue_format: int) -> str:
    """Return what Lua takes from Python: the format, and whether a script may run beside another one."""
    return f"local FORMAT, IS_STANDBY = {queue_format}, {str(name == 'standby').lower()}\n"


def _with_script_name(name: str, error: StoreError) -> StoreError:
    return StoreError(f"{name}: {error}")


def _is_data_error(error: BaseException | None) -> bool:
    """Return whether data in Redis made a script fail, and not the server's state."""
    text = str(error)
    return (
        type(error) is ResponseError
        and not is_access_denied(text)
        and any(words in text for words in _DATA_ERRORS)
    )
