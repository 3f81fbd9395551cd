"""The interface by which the servicer records finished RPCs."""

from collections.abc import Mapping
from typing import Protocol


class RpcRecorder(Protocol):
    """Records finished RPCs, as `RpcMetrics` does."""

    def count(self, *, code: str, seconds: float, caller: str, outcomes: Mapping[str, int]) -> None:
        """Count one RPC, and its pairs by outcome."""

    def count_quota_rejection(self, *, account: str, quota: str) -> None:
        """Count one RPC that was rejected because of a quota."""
