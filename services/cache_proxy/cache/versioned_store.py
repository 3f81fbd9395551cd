"""A store that falls back to the previous model version until the current one has its own answers."""

from collections.abc import Mapping, Sequence

from services.cache_proxy.cache.entry import FROM_PREVIOUS_VERSION
from services.cache_proxy.cache.store import AnswerStore
from services.common.compat import override


class VersionedStore(AnswerStore):
    """Read from the current version, then from the previous one; write to the current one only.

    To roll back, start with the other `--model-version`: its answers are unchanged.
    """

    def __init__(self, current: AnswerStore, previous: AnswerStore) -> None:
        self._current = current
        self._previous = previous

    @override
    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Return entries as `AnswerStore.get` does; those of the previous version have their mark set."""
        entries = list(await self._current.get(digests))
        missing = [index for index, entry in enumerate(entries) if not entry]
        if missing:
            previous = await self._previous.get([digests[index] for index in missing])
            for index, entry in zip(missing, previous, strict=True):
                entries[index] = entry | FROM_PREVIOUS_VERSION if entry else 0
        return entries

    @override
    async def put(self, levels_by_digest: Mapping[bytes, int]) -> None:
        await self._current.put(levels_by_digest)

    @override
    async def delete(self, digests: Sequence[bytes]) -> int:
        """Delete from both versions, else the older answer would be served again."""
        return await self._current.delete(digests) + await self._previous.delete(digests)

    @override
    async def close(self) -> None:
        # Both versions use the same connections.
        await self._current.close()
