"""Find the master that Sentinels name: query all of them at once and use the first answer.

redis-py queries one after the other, each with retries: with all of them down that took 37 to 77 s
(`redis.asyncio.sentinel.Sentinel.discover_master`, 8.1; redis/redis-py#684, #3560).
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.exceptions import RedisError

from services.cache_proxy.redis_client.backend import is_access_denied
from services.cache_proxy.redis_client.shared_attempt import SharedAttempt, first_success
from services.common.compat import override
from services.common.tasks import cancel_and_wait


class SentinelAccessDeniedError(MasterNotFoundError):
    """A Sentinel denied the login or the command, and no other Sentinel names a master."""

    def __init__(self, *, user: str, reason: str) -> None:
        super().__init__(
            f"a Sentinel refuses user {user!r} (see --sentinel-username, --sentinel-password-file): {reason}"
        )
        self.user = user


class ParallelSentinel(Sentinel):
    """The Sentinels that watch one service; a failed discovery is repeated only after `failure_ttl_seconds`.

    `user` is the ACL user of the connections, for messages.
    """

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        *,
        service: str,
        user: str,
        failure_ttl_seconds: float,
        options: dict[str, Any],
    ) -> None:
        super().__init__(list(hosts), sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        self._service = service
        self._user = user
        self._discovery = SharedAttempt(self._query_all, failure_ttl_seconds=failure_ttl_seconds)

    @override
    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """Return the address of the master, the first that a Sentinel names."""
        # The service is fixed.
        del service_name
        return await self._discovery.result()

    async def aclose(self) -> None:
        """Cancel the running discovery and close the connections."""
        await self._discovery.close()
        for sentinel in self.sentinels:
            await sentinel.aclose(close_connection_pool=True)

    async def _query_all(self) -> tuple[str, int]:
        queries = {asyncio.create_task(self._query(sentinel)) for sentinel in self.sentinels}
        try:
            return await first_success(queries)
        except (RedisError, OSError) as error:
            denied = [query for query in queries if isinstance(query.exception(), SentinelAccessDeniedError)]
            if denied:
                # Raises the error.
                denied[0].result()
            message = f"no Sentinel names a master of {self._service!r}: {error}"
            raise MasterNotFoundError(message) from error
        finally:
            await cancel_and_wait(queries)

    async def _query(self, sentinel: Any) -> tuple[str, int]:
        try:
            masters = await sentinel.sentinel_masters()
        except RedisError as error:
            if is_access_denied(error):
                raise SentinelAccessDeniedError(user=self._user, reason=str(error)) from error
            raise
        state = masters.get(self._service)
        if state is None:
            raise MasterNotFoundError("a Sentinel does not know it")
        if not self.check_master_state(state, self._service):
            raise MasterNotFoundError("a Sentinel reports that it is down")
        return state["ip"], state["port"]
