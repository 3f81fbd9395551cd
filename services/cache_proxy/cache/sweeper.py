"""What a replica does for the store beside answering: its note, and its part of the sweep."""

import asyncio
import logging
import random

from services.cache_proxy.cache import namespace
from services.cache_proxy.cache.buckets import TAGS
from services.cache_proxy.cache.entry import FreshnessPolicy
from services.cache_proxy.cache.redis_store import RedisStore
from services.cache_proxy.config.settings import KeySettings
from services.cache_proxy.errors import StoreError
from services.cache_proxy.redis_client.backend import RedisBackend

_log = logging.getLogger(__name__)

_STEP_INTERVAL_SECONDS = 1.0
_STEP_BUCKETS = 20  # a millisecond of Redis: 20 million pairs take one replica five hours
_IDLE_INTERVAL_SECONDS = (
    10.0  # where nothing expires and nothing is left over, there is only garbage to look for
)


class Sweeper:
    """Runs beside the store until it is cancelled; a Redis that cannot be reached is tried again."""

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
        """Leave the note, then sweep, a step a second where there is something to do."""
        noted = False
        while True:
            seconds = _STEP_INTERVAL_SECONDS
            try:
                if not noted:
                    await self._register()
                    noted = True
                else:
                    await namespace.ensure_registered(self._backend, self._key_settings, self._schema)
                more = await self.step(random.randrange(TAGS))  # noqa: S311 - which first does not matter
                if not more and not self._freshness.retention_days:
                    seconds = _IDLE_INTERVAL_SECONDS
            except StoreError as error:
                _log.debug("the store's housekeeping waits: %s", error)
            await asyncio.sleep(seconds)

    async def step(self, tag: int) -> bool:
        """Look at the next buckets of a tag; whether an earlier generation has left more of them."""
        kept_days = self._freshness.retention_days
        return (await self._store.sweep(tag, retention_days=kept_days, buckets=_STEP_BUCKETS)).has_leftovers

    async def _register(self) -> None:
        before = await namespace.register(self._backend, self._key_settings, self._schema)
        if before is not None:
            _log.warning(
                "the keys of this model version were made with other settings (--normalize %s, secret %s); "
                "those of this replica count from now on, and find nothing of what was cached before",
                before.normalize,
                before.secret_fingerprint,
            )
