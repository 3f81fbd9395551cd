"""The store of a process that wants no server: gone when it ends."""

from collections.abc import Mapping, Sequence

from services.cache_proxy.l1 import L1Cache

_MAX_BYTES = 2**32


class MemoryStore:
    """A larger L1 behind the store's protocol, so that `memory:` needs no path of its own."""

    def __init__(self) -> None:
        self._answers = L1Cache(max_bytes=_MAX_BYTES)

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `Store.get`."""
        return [self._answers.get(digest) for digest in digests]

    async def put(self, levels: Mapping[bytes, int]) -> None:
        """See `Store.put`."""
        for digest, level in levels.items():
            self._answers.put(digest, level)

    async def close(self) -> None:
        """See `Store.close`."""
