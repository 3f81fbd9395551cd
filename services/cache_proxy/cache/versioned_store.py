"""A new model version's answers, and until it has its own, the previous one's."""

from collections.abc import Mapping, Sequence

from services.cache_proxy.cache.entry import FROM_PREVIOUS_VERSION
from services.cache_proxy.cache.store import AnswerStore


class VersionedStore:
    """Looks into the previous version for what this one does not know; writes to this one only.

    Rolling back is to start with the other `--model-version`: its answers are where they were.
    """

    def __init__(self, current: AnswerStore, previous: AnswerStore) -> None:
        self._current = current
        self._previous = previous

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Store.get`; an entry of the previous version is marked as such."""
        entries = list(await self._current.get(digests))
        missing = [place for place, entry in enumerate(entries) if not entry]
        if missing:
            found = await self._previous.get([digests[place] for place in missing])
            for place, entry in zip(missing, found, strict=True):
                entries[place] = entry | FROM_PREVIOUS_VERSION if entry else 0
        return entries

    async def put(self, levels_by_digest: Mapping[bytes, int]) -> None:
        """See `Store.put`."""
        await self._current.put(levels_by_digest)

    async def delete(self, digests: Sequence[bytes]) -> int:
        """See `Store.forget`; of both versions, or the older answer would come back."""
        return await self._current.delete(digests) + await self._previous.delete(digests)

    async def close(self) -> None:
        """See `Store.close`; both are on the same connections."""
        await self._current.close()
