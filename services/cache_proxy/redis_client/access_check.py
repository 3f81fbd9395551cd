"""Check that Redis allows this replica every command, key and channel that it needs, before it takes part.

A missing permission otherwise shows late, in the middle of a script, and a script that is half done is worse
than one that did not run. So a replica tries every command on keys of its own when it starts, and again
before it returns to the shared queue after a command was denied.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.cache_proxy.errors import StoreAccessDeniedError, StoreError
from services.cache_proxy.redis_client.backend import CLIENT_ERRORS, is_access_denied, to_store_error
from services.cache_proxy.redis_client.lua_script import load_script
from services.cache_proxy.redis_client.node import QueueNode
from services.cache_proxy.redis_client.sentinels import SentinelAccessDeniedError

_CHECK_ACCESS = load_script(Path(__file__).parent / "lua/check_access.lua")
_SUBSCRIBE_TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessCheck:
    """A check of the permissions of one replica.

    `key_prefixes` are the beginnings of the keys that the replica uses, one for each pattern that an ACL may
    name. On a Cluster each must have a hash tag, because the keys of a script must be on one node.
    """

    node: QueueNode
    key_prefixes: Sequence[str]
    channel: str
    user: str

    async def run(self) -> None:
        """Raise `StoreAccessDeniedError` for the first denied command.

        Raises `StoreError` if Redis is unreachable.
        """
        for key_prefix in self.key_prefixes:
            await self._check_scripts(key_prefix, "")
        await self._check_scripts(f"{self.channel}:check", f"{self.channel}:check")
        await self._run_command(self.channel, "INFO", "memory")
        await self._check_subscription()

    async def _check_scripts(self, key_prefix: str, channel: str) -> None:
        replies = [
            await self._run_command(key_prefix, command, script, 1, f"{key_prefix}:check", channel)
            for command, script in (("EVAL", _CHECK_ACCESS.text), ("EVALSHA", _CHECK_ACCESS.sha))
        ]
        for command, message in replies[-1]:
            text = message.decode("utf-8", "replace")
            if is_access_denied(text):
                raise StoreAccessDeniedError(command=command.decode().lower(), user=self.user, reason=text)

    async def _run_command(self, key: str, *command: object) -> list[tuple[bytes, bytes]]:
        try:
            reply: list[tuple[bytes, bytes]] = await self.node.command_for_key(key, *command)
        except StoreError as error:
            if isinstance(error.__cause__, SentinelAccessDeniedError):
                raise _sentinel_access_error(error.__cause__) from error
            if is_access_denied(error.__cause__ or error):
                name = str(command[0]).lower()
                raise StoreAccessDeniedError(command=name, user=self.user, reason=str(error)) from error
            raise
        return reply

    async def _check_subscription(self) -> None:
        try:
            async with await self.node.create_pubsub() as pubsub:
                await pubsub.subscribe(f"{self.channel}:check")
                with contextlib.suppress(TimeoutError):
                    await pubsub.get_message(timeout=_SUBSCRIBE_TIMEOUT_SECONDS)
        except CLIENT_ERRORS as error:
            if isinstance(error, SentinelAccessDeniedError):
                raise _sentinel_access_error(error) from error
            if is_access_denied(error):
                reason = str(error)
                raise StoreAccessDeniedError(command="subscribe", user=self.user, reason=reason) from error
            raise to_store_error(error) from error


def _sentinel_access_error(error: SentinelAccessDeniedError) -> StoreAccessDeniedError:
    return StoreAccessDeniedError(command="sentinel masters", user=error.user, reason=str(error))
