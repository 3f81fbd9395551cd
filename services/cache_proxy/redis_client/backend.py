"""The interface to a Redis server or a Cluster, and its implementation for a single server."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import redis.asyncio
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from services.cache_proxy.errors import StoreError, StoreRejectedError
from services.cache_proxy.redis_client.lua_script import Script
from services.common.compat import override

CLIENT_ERRORS = (RedisError, RedisClusterException, OSError, AttributeError)
"""The exceptions that redis-py raises when a command fails.

`RedisClusterException` is no `RedisError`. `AttributeError` is raised when one task sends on a connection
that another task drops, as redis-py drops the connections to a node that left a Cluster: its writer is None
then.
"""


_ACCESS_DENIED_TEXTS = (
    "NOPERM",
    "NOAUTH",
    "WRONGPASS",
    "ACL failure in script",
    "has no permissions to",
    # Redis 6.2, in a script.
    "can't run this command",
    "can't access at least one of the keys",
    "can't publish to the channel",
    "unknown command",
    "unknown subcommand",
    "Unknown Redis command",
    "not allowed from script",
)


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """One call of a script: `key` decides on which server it runs, `args` are its ARGV."""

    key: str
    args: Sequence[Any]


class SlotMovingError(StoreRejectedError):
    """The hash slot of a call moves to another node: some of its keys are here and some are there."""


class RedisBackend(Protocol):
    """Run scripts and commands on the server that has their key."""

    one_tag_per_call: bool
    """Whether a script call may cover the pairs of one tag only."""

    async def run_script(self, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        """Return the reply to each call, or the `StoreError` with which it failed."""

    async def execute(self, key: str, *command: Any) -> Any:
        """Return the reply to a command on one key. Raises `StoreError`."""

    async def read_many(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Return the replies to commands on one key each, their second word. Raises `StoreError`."""

    async def close(self) -> None:
        """Close the connections."""


class SingleServerBackend(RedisBackend):
    """One server, or the master that Sentinels name."""

    one_tag_per_call = False

    def __init__(self, client: "redis.asyncio.Redis") -> None:
        self._client = client

    @override
    async def run_script(self, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        return [await self._run_call(script, call) for call in calls]

    async def _run_call(self, script: Script, call: ScriptCall) -> Any:
        try:
            try:
                return await self._client.evalsha(script.sha, 1, call.key, *call.args)
            except NoScriptError:
                return await self._client.eval(script.text, 1, call.key, *call.args)
        except CLIENT_ERRORS as error:
            return to_store_error(error)

    @override
    async def execute(self, key: str, *command: Any) -> Any:
        del key
        try:
            return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except CLIENT_ERRORS as error:
            raise to_store_error(error) from error

    @override
    async def read_many(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [await self.execute(command[1], *command) for command in commands]

    @override
    async def close(self) -> None:
        pool = self._client.connection_pool
        # The client does not close a pool that was passed to it unless this flag is set.
        await self._client.aclose(close_connection_pool=True)
        if isinstance(pool, SentinelConnectionPool):
            await pool.sentinel_manager.aclose()


def is_wrong_type(error: StoreError) -> bool:
    """Return whether a command failed because its key holds a value of another type."""
    return "WRONGTYPE" in str(error)


async def run_replacing_wrong_type(backend: RedisBackend, key: str, *command: Any) -> Any:
    """Run a command, and delete its key first if that holds a value of another type, which is garbage.

    For commands that write, or whose caller writes next. Raises `StoreError`.
    """
    try:
        return await backend.execute(key, *command)
    except StoreRejectedError as error:
        if not is_wrong_type(error):
            raise
        await backend.execute(key, "UNLINK", key)
        return await backend.execute(key, *command)


def is_access_denied(error: BaseException | str) -> bool:
    """Return whether Redis denied a permission or a login, or lacks a command.

    Recognized by the texts of Redis 6.2 to 8 and Valkey, because errors of scripts have no type of error,
    only a text.
    """
    if isinstance(error, AuthenticationError | NoPermissionError):
        return True
    text = str(error)
    return any(denied in text for denied in _ACCESS_DENIED_TEXTS)


def to_store_error(error: Exception) -> StoreError:
    """Return the `StoreError` for an exception of redis-py, which becomes its cause."""
    text = str(error) or type(error).__name__
    is_unreachable = isinstance(error, RedisConnectionError | RedisTimeoutError | OSError)
    is_rejected = isinstance(error, ResponseError) and not is_unreachable
    failure = StoreRejectedError(text) if is_rejected else StoreError(text)
    failure.__cause__ = error
    return failure
