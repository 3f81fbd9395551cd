"""The store of a process that wants no server: gone when it ends."""

from collections.abc import Mapping, Sequence

from services.cache_proxy.cache.entry import pack_entry, today

_MAX_ENTRIES = 20_000_000  # about 3 GB


class MemoryStore:
    """A dict; the oldest go when it is full.

    State: `_entries`, in the order in which they were first put; event loop only.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, int] = {}

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Store.get`."""
        return [self._entries.get(digest, 0) for digest in digests]

    async def put(self, levels_by_digest: Mapping[bytes, int]) -> None:
        """See `Store.put`."""
        day = today()
        for digest, level in levels_by_digest.items():
            self._entries[digest] = pack_entry(level, day)
        while len(self._entries) > _MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]

    async def delete(self, digests: Sequence[bytes]) -> int:
        """See `Store.forget`."""
        return sum(self._entries.pop(digest, None) is not None for digest in digests)

    async def close(self) -> None:
        """See `Store.close`."""
