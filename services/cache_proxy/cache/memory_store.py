"""A store in the memory of the process, without a server; its content is lost when the process ends."""

from collections.abc import Mapping, Sequence

from services.cache_proxy.cache.entry import pack_entry, today
from services.cache_proxy.cache.store import AnswerStore
from services.common.compat import override

# About 3 GB.
_MAX_ENTRIES = 20_000_000


class MemoryStore(AnswerStore):
    """A dict that drops its oldest entries when it is full.

    State: `_entries`, in the order in which digests were first stored. Used from the event loop only.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, int] = {}

    @override
    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        return [self._entries.get(digest, 0) for digest in digests]

    @override
    async def put(self, levels_by_digest: Mapping[bytes, int]) -> None:
        day = today()
        for digest, level in levels_by_digest.items():
            self._entries[digest] = pack_entry(level, day)
        while len(self._entries) > _MAX_ENTRIES:
            del self._entries[next(iter(self._entries))]

    @override
    async def delete(self, digests: Sequence[bytes]) -> int:
        return sum(self._entries.pop(digest, None) is not None for digest in digests)

    @override
    async def close(self) -> None:
        pass
