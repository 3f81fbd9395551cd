"""The background task of a replica for the store: it registers the key schema and deletes old entries."""

import asyncio
import logging
import random

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.buckets import TAGS
from services.cache_proxy.cache.entry import FreshnessPolicy
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.config.cache_settings import KeySettings
from services.cache_proxy.errors import StoreError
from services.cache_proxy.redis_client.backend import RedisBackend

_log = logging.getLogger(__name__)

_STEP_INTERVAL_SECONDS = 1.0
# One step takes a millisecond of Redis; for 20 million pairs, one replica takes five hours.
_STEP_BUCKETS = 20
# Where entries do not expire and nothing is left over, only garbage is to be found.
_IDLE_INTERVAL_SECONDS = 10.0


class Sweeper:
    """Sweep the store until it is cancelled; while Redis is unreachable, try again."""

    def __init__(
        self,
        backend: RedisBackend,
        store: RedisStore,
        *,
        key_settings: KeySettings,
        freshness: FreshnessPolicy,
    ) -> None:
        self._backend = backend
        self._store = store
        self._key_settings = key_settings
        self._schema = namespace.key_schema(key_settings)
        self._freshness = freshness

    async def run(self) -> None:
        """Register the key schema, then sweep in steps: one a second while there is work, else less often."""
        registered = False
        while True:
            interval_seconds = _STEP_INTERVAL_SECONDS
            try:
                if not registered:
                    await self._register()
                    registered = True
                else:
                    await namespace.ensure_registered(self._backend, self._key_settings, self._schema)
                # Any order of the tags will do.
                has_leftovers = await self.step(random.randrange(TAGS))  # noqa: S311
                if not has_leftovers and not self._freshness.retention_days:
                    interval_seconds = _IDLE_INTERVAL_SECONDS
            except StoreError as error:
                _log.debug("the store's housekeeping waits: %s", error)
            await asyncio.sleep(interval_seconds)

    async def step(self, tag: int) -> bool:
        """Sweep the next buckets of a tag and return whether earlier generations have left more of them."""
        retention_days = self._freshness.retention_days
        result = await self._store.sweep(tag, retention_days=retention_days, buckets=_STEP_BUCKETS)
        return result.has_leftovers

    async def _register(self) -> None:
        previous = await namespace.register(self._backend, self._key_settings, self._schema)
        if previous is not None:
            _log.warning(
                "the keys of this model version were made with other settings (--normalize %s, secret %s); "
                "those of this replica count from now on, and find nothing of what was cached before",
                previous.normalize,
                previous.secret_fingerprint,
            )
