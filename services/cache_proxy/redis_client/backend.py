"""One server behind the store, or many: `Servers` is all that the store knows of either."""

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

CLIENT_ERRORS = (RedisError, RedisClusterException, OSError, AttributeError)
"""What redis-py raises when a server cannot be asked. The second is not of the first's kind. The last
comes of a connection that one task sends on and another drops, as redis-py does with those of a node that has
left a Cluster: its writer is None then."""


_ACCESS_DENIED_TEXTS = (
    "NOPERM",
    "NOAUTH",
    "WRONGPASS",
    "ACL failure in script",
    "has no permissions to",
    "can't run this command",  # 6.2, in a script
    "can't access at least one of the keys",
    "can't publish to the channel",
    "unknown command",
    "unknown subcommand",
    "Unknown Redis command",
    "not allowed from script",
)


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """A script's call: the key that says where it runs, and its arguments."""

    key: str
    args: Sequence[Any]


class SlotMovingError(StoreRejectedError):
    """The call's slot is on its way to another node: half of its keys are here, half there."""


class RedisBackend(Protocol):
    """Where scripts run."""

    one_tag_per_call: bool
    """Whether a call may be about the pairs of one tag only."""

    async def run_script(self, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        """Each call's reply, or the `StoreError` that it ended with."""

    async def execute(self, key: str, *command: Any) -> Any:
        """A command about one key. Raises `StoreError`."""

    async def read_many(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies to commands about one key each, their second word. Raises `StoreError`."""

    async def close(self) -> None:
        """Let go of the connections."""


class SingleServerBackend:
    """A server by itself, or the master that Sentinels name."""

    one_tag_per_call = False

    def __init__(self, client: "redis.asyncio.Redis") -> None:
        self._client = client

    async def run_script(self, script: Script, calls: Sequence[ScriptCall]) -> list[Any]:
        """See `Servers.run`."""
        return [await self._run_call(script, call) for call in calls]

    async def _run_call(self, script: Script, call: ScriptCall) -> Any:
        try:
            try:
                return await self._client.evalsha(script.sha, 1, call.key, *call.args)
            except NoScriptError:
                return await self._client.eval(script.text, 1, call.key, *call.args)
        except CLIENT_ERRORS as error:
            return to_store_error(error)

    async def execute(self, key: str, *command: Any) -> Any:
        """See `Servers.command`."""
        del key
        try:
            return await self._client.execute_command(*command)  # type: ignore[no-untyped-call]
        except CLIENT_ERRORS as error:
            raise to_store_error(error) from error

    async def read_many(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Servers.read`."""
        return [await self.execute(command[1], *command) for command in commands]

    async def close(self) -> None:
        """See `Servers.close`."""
        pool = self._client.connection_pool
        await self._client.aclose(close_connection_pool=True)  # which it does not do by itself
        if isinstance(pool, SentinelConnectionPool):
            await pool.sentinel_manager.aclose()


def is_wrong_type(error: StoreError) -> bool:
    """Whether the key holds something that this command is not for."""
    return "WRONGTYPE" in str(error)


async def run_replacing_wrong_type(backend: RedisBackend, key: str, *command: Any) -> Any:
    """A command that writes, or whose caller will: what has another type is garbage, and dropped first."""
    try:
        return await backend.execute(key, *command)
    except StoreRejectedError as error:
        if not is_wrong_type(error):
            raise
        await backend.execute(key, "UNLINK", key)
        return await backend.execute(key, *command)


def is_access_denied(error: BaseException | str) -> bool:
    """Return whether Redis refused a right, a login or a command that it does not have.

    By the words of Redis 6.2 to 8 and Valkey: a script's error has no other kind than its text.
    """
    if isinstance(error, AuthenticationError | NoPermissionError):
        return True
    text = str(error)
    return any(words in text for words in _ACCESS_DENIED_TEXTS)


def to_store_error(error: Exception) -> StoreError:
    """The store's word for what went wrong."""
    text = str(error) or type(error).__name__
    away = isinstance(error, RedisConnectionError | RedisTimeoutError | OSError)
    refused = isinstance(error, ResponseError) and not away
    failure = StoreRejectedError(text) if refused else StoreError(text)
    failure.__cause__ = error
    return failure
