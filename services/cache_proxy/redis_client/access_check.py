"""Whether Redis lets this replica do all that it needs: each command, key and channel, before it takes part.

A missing right shows late, in the middle of a script, and half a script's work is worse than none. So a
replica tries everything on keys of its own when it starts, and again before it returns to the shared queue
after a command was refused.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from services.cache_proxy.cache.cache_scripts import CHECK_ACCESS
from services.cache_proxy.errors import AccessRefusedByStore, StoreError
from services.cache_proxy.redis_client.backend import FAILURES, is_access_refusal, translated
from services.cache_proxy.redis_client.node import Home
from services.cache_proxy.redis_client.sentinels import SentinelAccessRefused

_SUBSCRIBE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AccessCheck:
    """`keys` begin the keys that the replica uses, one for each pattern that an ACL may name.

    On a Cluster each needs a hash tag, for a script's keys must be on one node.
    """

    home: Home
    keys: Sequence[str]
    channel: str
    user: str

    async def run(self) -> None:
        """Raise `AccessRefusedByStore` for the first command refused, `StoreError` if Redis is away."""
        for key in self.keys:
            await self._try_scripts(key, "")
        await self._try_scripts(f"{self.channel}:check", f"{self.channel}:check")
        await self._try(self.channel, "INFO", "memory")
        await self._try_subscription()

    async def _try_scripts(self, key: str, channel: str) -> None:
        replies = [
            await self._try(key, how, script, 1, f"{key}:check", channel)
            for how, script in (("EVAL", CHECK_ACCESS.text), ("EVALSHA", CHECK_ACCESS.sha))
        ]
        for command, message in replies[-1]:
            text = message.decode("utf-8", "replace")
            if is_access_refusal(text):
                raise AccessRefusedByStore(command=command.decode().lower(), user=self.user, reason=text)

    async def _try(self, key: str, *command: object) -> list[tuple[bytes, bytes]]:
        try:
            reply: list[tuple[bytes, bytes]] = await self.home.command_at(key, *command)
        except StoreError as error:
            if isinstance(error.__cause__, SentinelAccessRefused):
                raise _refused_by_sentinel(error.__cause__) from error
            if is_access_refusal(error.__cause__ or error):
                name = str(command[0]).lower()
                raise AccessRefusedByStore(command=name, user=self.user, reason=str(error)) from error
            raise
        return reply

    async def _try_subscription(self) -> None:
        try:
            async with await self.home.subscription() as pubsub:
                await pubsub.subscribe(f"{self.channel}:check")
                with contextlib.suppress(TimeoutError):
                    await pubsub.get_message(timeout=_SUBSCRIBE_SECONDS)
        except FAILURES as error:
            if isinstance(error, SentinelAccessRefused):
                raise _refused_by_sentinel(error) from error
            if is_access_refusal(error):
                reason = str(error)
                raise AccessRefusedByStore(command="subscribe", user=self.user, reason=reason) from error
            raise translated(error) from error


def _refused_by_sentinel(error: SentinelAccessRefused) -> AccessRefusedByStore:
    return AccessRefusedByStore(command="sentinel masters", user=error.user, reason=str(error))
