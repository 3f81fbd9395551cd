"""The queue's Lua scripts, each one decision, and the keys that they share."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis.asyncio
from redis.commands.core import AsyncScript
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.errors import StoreError
from services.cache_proxy.metrics import ProxyMetrics

_log = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "lua"
_NAMES = (
    "enqueue",
    "leave",
    "claim",
    "late",
    "put_back",
    "fulfil",
    "buried",
    "fail",
    "refuse",
    "heartbeat",
    "verdict",
    "configure",
    "repair",
)
_ATTEMPTS = 4
_MAX_CALLS = 8
_SERVER_CODES = {"OOM", "MISCONF", "NOREPLICAS", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "BUSY", "NOPERM"}


class Keys:
    """Every key of the queue: one limit for a deployment, one queue for a namespace, all on one hash tag."""

    def __init__(self, *, prefix: str, namespace: str) -> None:
        self.limit = f"{{{prefix}}}:limit"
        self.base = f"{{{prefix}}}:q1:{namespace}:"
        self.channel = f"{self.base}ended"
        self.log = f"{self.base}log"
        """Of what was invalidated: see `store/invalidation.py`."""


class Scripts:
    """Runs a script by name. Each may be run twice under one token, so a lost reply is asked for again."""

    def __init__(self, client: "redis.asyncio.Redis", keys: Keys, *, metrics: ProxyMetrics) -> None:
        prelude = (_FOLDER / "prelude.lua").read_text()
        self._scripts: dict[str, AsyncScript] = {
            name: client.register_script(prelude + (_FOLDER / f"{name}.lua").read_text()) for name in _NAMES
        }
        self._keys = [keys.limit, keys.base]
        self.channel = keys.channel
        self._metrics = metrics
        self._turns = asyncio.Semaphore(_MAX_CALLS)

    async def run(self, name: str, args: Sequence[Any]) -> Any:
        """The script's reply. Raises `StoreError` when none came, however often it was asked for."""
        async with self._turns:
            try:
                return await self._run(name, args)
            except ResponseError as error:
                if not _is_about_data(error):
                    raise _failed(name, error) from error
                _log.warning("the queue in Redis is damaged and made anew: %s: %s", name, error)
                self._metrics.store_garbage.inc()
            try:
                await self._run("repair", [])
                return await self._run(name, args)
            except ResponseError as error:
                raise _failed(name, error) from error

    async def _run(self, name: str, args: Sequence[Any]) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with self._metrics.store_duration.labels(name).time():
                    return await self._scripts[name](keys=self._keys, args=args)
            except NoScriptError as error:  # flushed again since it was loaded
                if attempt == _ATTEMPTS:
                    raise _failed(name, error) from error
            except ResponseError:
                raise
            except (RedisError, OSError) as error:
                broken = isinstance(error, RedisConnectionError | OSError)
                slow = isinstance(error, RedisTimeoutError | TimeoutError)  # then once is enough
                if slow or not broken or attempt == _ATTEMPTS:
                    raise _failed(name, error) from error
        raise AssertionError


def _failed(name: str, error: Exception) -> StoreError:
    return StoreError(f"{name}: {str(error) or type(error).__name__}")


def _is_about_data(error: ResponseError) -> bool:
    """Whether a script stumbled over what it found, not over the server's state."""
    text = str(error)
    return (
        type(error) is ResponseError
        and (text.startswith("WRONGTYPE") or "user_script" in text)
        and (text.split(" ", 1)[0] not in _SERVER_CODES)
    )
