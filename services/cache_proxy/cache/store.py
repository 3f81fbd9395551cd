"""L2: what all replicas remember, behind one small protocol.

`redis.py` speaks to any server, alone or in a Cluster, `embedded.py` starts one, `memory.py` is for a process
that wants neither; `guarded.py` is how the rest of the proxy sees them: a store that never raises.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol


class AnswerStore(Protocol):
    """Answers by digest. Every method may raise `StoreError`, and nothing else."""

    async def get(self, digests: Sequence[bytes]) -> Sequence[int]:
        """The entry (`dated.py`) of each digest, by position, however old; 0 where none is known."""

    async def put(self, levels_by_digest: Mapping[bytes, int]) -> None:
        """Remember levels as of today; repeating a call changes nothing."""

    async def delete(self, digests: Sequence[bytes]) -> int:
        """Forget these; how many were known."""

    async def close(self) -> None:
        """Let go of connections and processes."""
