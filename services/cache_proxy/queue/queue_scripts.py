"""The queue's Lua scripts, each one decision, and the keys that they share."""

import asyncio
import itertools
import logging
import re
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from redis.exceptions import AskError, NoScriptError, ReadOnlyError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.cache.cache_scripts import Script
from services.cache_proxy.errors import AccessRefusedByStore, StoreDamaged, StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.redis_client.backend import is_access_refusal
from services.cache_proxy.redis_client.node import Home

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "lua"
_NAMES = (
    "enqueue",
    "leave",
    "claim",
    "late",
    "put_back",
    "fulfil",
    "fail",
    "refuse",
    "heartbeat",
    "verdict",
    "overview",
    "configure",
    "repair",
)
_ATTEMPTS = 4
_MAX_CALLS = 8
_MOVING_SECONDS, _MOVING_PAUSE_SECONDS = 0.5, 0.02  # an operator moves a slot of few keys in less
# What a script's error says when data in Redis caused it: Lua's own words, and those of commands for numbers.
# All else is the server's state: a new queue would mend nothing, and cost every replica its own.
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
_REFUSED_COMMAND = re.compile(r"the '([^']{1,60})' command")


class Keys:
    """Every key of the queue, on one hash tag.

    They are one limit for a deployment, one queue for a namespace, and the failures of each model target.

    `base` itself is never a key. So while a Cluster moves the slot, a script, which declares both, is refused
    (TRYAGAIN) instead of run on what of the queue is still there.
    """

    def __init__(self, *, prefix: str, namespace: str, model_target: str = "") -> None:
        self.limit = f"{{{prefix}}}:limit"
        target = blake2b(model_target.encode(), digest_size=8).hexdigest()
        self.model = f"{self.limit}:model:{target}"
        """The failures of a model target: of all namespaces that call it."""
        self.base = f"{{{prefix}}}:q1:{namespace}:"
        self.log = f"{self.base}log"
        """Of what was invalidated: see `store/invalidation.py`."""

    def channel(self, database: int) -> str:
        """Return the channel for messages of this queue. A server has one set for all databases."""
        return f"{self.base}ended@{database}" if database else f"{self.base}ended"


class Scripts:
    """Runs a script by name. Each may be run twice under one token, so a lost reply is asked for again.

    State: `_repaired_for`, the script whose failure made this replica repair the queue, until that script
    works again; `_has_worked`, whether any other did since; `_repairs`, how many there were; event loop
    only. The queue is not repaired again for the same script, nor while none works: that would mend nothing.
    """

    def __init__(self, home: Home, keys: Keys, *, metrics: ProxyMetrics) -> None:
        prelude = (_FOLDER / "prelude.lua").read_text()
        self._scripts = {name: Script(prelude + (_FOLDER / f"{name}.lua").read_text()) for name in _NAMES}
        self._home = home
        self.channel = keys.channel(home.database)
        self._keys = [keys.limit, keys.base, self.channel, keys.model]
        self.model = keys.model
        self._metrics = metrics
        self._turns = asyncio.Semaphore(_MAX_CALLS)
        self._repaired_for: str | None = None
        self._has_worked = True
        self._repairs = 0
        self._repairing = asyncio.Lock()

    @property
    def on_cluster(self) -> bool:
        """Whether they run on one node of several."""
        return self._home.is_cluster

    async def run(self, name: str, args: Sequence[Any]) -> Any:
        """The script's reply. Raises `StoreError` when none came, however often it was asked for."""
        async with self._turns:
            repairs = self._repairs
            try:
                return await self._run(name, args)
            except StoreError as error:
                if not _is_about_data(error.__cause__):
                    raise
                await self._repair_once(name, error, repairs=repairs)
            try:
                return await self._run(name, args)
            except StoreError as error:
                if _is_about_data(error.__cause__):
                    raise StoreDamaged(str(error)) from error
                raise

    async def _repair_once(self, name: str, error: StoreError, *, repairs: int) -> None:
        """Make the queue anew, unless that was done since there were so many `repairs`.

        Several scripts find the same damage at once. Raises `StoreError`.
        """
        async with self._repairing:
            if self._repairs != repairs:
                return
            if self._repaired_for is not None and (self._repaired_for == name or not self._has_worked):
                raise StoreDamaged(str(error)) from error
            self._repaired_for, self._has_worked = name, False
            _log.warning("the queue in Redis is damaged and made anew: %s", error)
            self._metrics.store_garbage.inc()
            await self._run("repair", [])
            self._repairs += 1

    async def _run(self, name: str, args: Sequence[Any]) -> Any:
        script = self._scripts[name]
        how = ("EVALSHA", script.sha)
        moving_until = time.monotonic() + _MOVING_SECONDS
        for attempt in itertools.count(1):
            try:
                with self._metrics.store_duration.labels(name).time():
                    reply = await self._home.command(*how, len(self._keys), *self._keys, *args)
            except StoreError as error:
                how = await self._next_try(name, how, error, attempt=attempt, moving_until=moving_until)
            else:
                if self._repaired_for == name:
                    self._repaired_for = None
                self._has_worked = self._has_worked or name != "repair"
                return reply
        raise AssertionError

    async def _next_try(
        self, name: str, how: tuple[str, str], error: StoreError, *, attempt: int, moving_until: float
    ) -> tuple[str, str]:
        """Return the command for the next attempt. Raises `StoreError` if there is to be none."""
        cause = error.__cause__
        if isinstance(cause, AskError | TryAgainError) and time.monotonic() < moving_until:
            await asyncio.sleep(_MOVING_PAUSE_SECONDS)  # it did not run, and soon will elsewhere
            return how
        if is_access_refusal(cause or error):
            raise self._refused(name, error) from cause
        if isinstance(cause, ReadOnlyError):
            await self._home.drop_connections()
        elif not isinstance(cause, NoScriptError) and not self._may_just_be_lost(cause, attempt):
            raise _failed(name, error) from cause
        if attempt >= _ATTEMPTS:
            raise _failed(name, error) from cause
        return ("EVAL", self._scripts[name].text) if isinstance(cause, NoScriptError) else how

    def _refused(self, name: str, error: StoreError) -> AccessRefusedByStore:
        found = _REFUSED_COMMAND.search(str(error))
        command = found[1].lower() if found else name
        return AccessRefusedByStore(command=command, user=self._home.user, reason=str(error))

    def _may_just_be_lost(self, cause: BaseException | None, attempt: int) -> bool:
        """Whether only the reply was lost, or the connection. What is slow twice is slow."""
        if isinstance(cause, RedisTimeoutError | TimeoutError):
            return self._home.is_cluster and attempt == 1  # elsewhere the client has asked twice
        return isinstance(cause, RedisConnectionError | OSError)


def _failed(name: str, error: StoreError) -> StoreError:
    return StoreError(f"{name}: {error}")


def _is_about_data(error: BaseException | None) -> bool:
    """Whether a script failed over what it found in Redis, and not by the server's state."""
    text = str(error)
    return (
        type(error) is ResponseError
        and not is_access_refusal(text)
        and any(words in text for words in _DATA_ERRORS)
    )
