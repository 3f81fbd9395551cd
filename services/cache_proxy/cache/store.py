"""The interface of the shared answer cache (L2)."""

from collections.abc import Mapping, Sequence
from typing import Protocol


class AnswerStore(Protocol):
    """Store answers by the digest of their pair.

    Implementations: `redis_store.py` for one server or a Cluster, `memory_store.py` for a single process,
    `versioned_store.py` for two model versions. The rest of the proxy uses `resilient_store.py`, which never
    raises.

    Every method may raise `StoreError` and no other error.
    """

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Return one entry (see `entry.py`) for each digest, whatever its age; 0 for an unknown digest."""

    async def put(self, levels_by_digest: Mapping[bytes, int]) -> None:
        """Store levels with the current day as their date; repeating a call changes nothing."""

    async def delete(self, digests: Sequence[bytes]) -> int:
        """Delete entries and return how many of them existed."""

    async def close(self) -> None:
        """Close connections and stop child processes."""
