"""Load: asynchronous callers that retry as the server's pushback demands and check every answer."""

import asyncio
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import grpc
from grpc import aio

from protos import seniority_pb2 as pb
from protos import seniority_pb2_grpc
from services.model_stub.levels import infer_level

Pairs = Sequence[tuple[str, str]]
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
# gRPC ends some RPCs as CANCELLED, not UNAVAILABLE, when the server's process is killed during them.
_RETRYABLE_CODES = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
)


@dataclass
class LoadStats:
    """What all callers observed. `rpc_seconds` has one entry for each answered RPC, its retries included."""

    answered_pairs: int = 0
    wrong_pairs: list[tuple[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    retries: int = 0
    hits: int = 0
    misses: int = 0
    rpc_seconds: list[float] = field(default_factory=list)

    def percentile(self, fraction: float) -> float:
        """Return the seconds within which this fraction of the RPCs was answered."""
        return sorted(self.rpc_seconds)[min(len(self.rpc_seconds) - 1, int(fraction * len(self.rpc_seconds)))]


class LoadCaller:
    """A caller that turns to the next target after a failure, as a load-balanced channel would."""

    def __init__(self, targets: Sequence[str], name: str, stats: LoadStats) -> None:
        self._channels = [aio.insecure_channel(target, options=_OPTIONS) for target in targets]
        self._stubs = [seniority_pb2_grpc.SeniorityModelStub(channel) for channel in self._channels]
        self._name = name
        self._stats = stats
        self._target_index = 0

    async def infer(
        self,
        pairs: Pairs,
        *,
        timeout_seconds: float = 120,
        priority: str = "interactive",
        max_attempts: int = 60,
    ) -> None:
        """Send pairs until they are answered. After the last attempt record the error."""
        request = pb.SeniorityRequestBatch(
            batch=[
                pb.SeniorityRequest(uuid=number, company=company, title=title)
                for number, (company, title) in enumerate(pairs)
            ]
        )
        metadata = (("x-caller", self._name), ("x-priority", priority))
        started_at = time.monotonic()
        for attempt in range(1, max_attempts + 1):
            stub = self._stubs[self._target_index % len(self._stubs)]
            call = stub.InferSeniority(request, timeout=timeout_seconds, metadata=metadata)
            try:
                response = await call
            except aio.AioRpcError as error:
                if error.code() not in _RETRYABLE_CODES or attempt == max_attempts:
                    self._stats.errors.append(f"{error.code().name}: {error.details()}")
                    return
                self._stats.retries += 1
                self._target_index += 1
                trailers = dict(error.trailing_metadata() or ())
                await asyncio.sleep(int(trailers.get("grpc-retry-pushback-ms", 100)) / 1000)
            else:
                self._record(pairs, response, dict(await call.trailing_metadata()), started_at)
                return

    def _record(
        self, pairs: Pairs, response: pb.SeniorityResponseBatch, trailers: object, started_at: float
    ) -> None:
        stats = self._stats
        stats.rpc_seconds.append(time.monotonic() - started_at)
        stats.answered_pairs += len(pairs)
        if isinstance(trailers, dict):
            stats.hits += int(trailers.get("x-cache-hits", 0))
            stats.misses += int(trailers.get("x-cache-misses", 0))
        answers = [(answer.uuid, answer.seniority) for answer in response.batch]
        if answers != [(number, infer_level(*pair)) for number, pair in enumerate(pairs)]:
            stats.wrong_pairs += pairs

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()


def split_randomly(pairs: Pairs, sizes: tuple[int, int], rng: random.Random) -> Iterable[Pairs]:
    """Split pairs into requests whose sizes are drawn between the two given ones."""
    position = 0
    while position < len(pairs):
        size = rng.randint(*sizes)
        yield pairs[position : position + size]
        position += size
