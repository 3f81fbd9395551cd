"""Load: callers of their own connections, which come back as a pushback says, and check every answer."""

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
# gRPC ends some RPCs as CANCELLED, not UNAVAILABLE, when the server's process is killed under them.
_RETRYABLE_CODES = (
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
)


@dataclass
class LoadStats:
    """What callers saw. `seconds` has one entry for each RPC that was answered, its retries in it."""

    answered_pairs: int = 0
    wrong_pairs: list[tuple[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    retries: int = 0
    hits: int = 0
    misses: int = 0
    rpc_seconds: list[float] = field(default_factory=list)

    def percentile(self, fraction: float) -> float:
        """Seconds within which that share of the RPCs was answered."""
        return sorted(self.rpc_seconds)[min(len(self.rpc_seconds) - 1, int(fraction * len(self.rpc_seconds)))]


class LoadCaller:
    """One caller. It goes round the replicas when one is gone, as a balanced channel would."""

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
        """Ask until answered; what no retry helped is noted as failed."""
        request = pb.SeniorityRequestBatch(
            batch=[
                pb.SeniorityRequest(uuid=number, company=company, title=title)
                for number, (company, title) in enumerate(pairs)
            ]
        )
        metadata = (("x-caller", self._name), ("x-priority", priority))
        began = time.monotonic()
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
                self._record(pairs, response, dict(await call.trailing_metadata()), began)
                return

    def _record(
        self, pairs: Pairs, response: pb.SeniorityResponseBatch, trailers: object, began: float
    ) -> None:
        tally = self._stats
        tally.rpc_seconds.append(time.monotonic() - began)
        tally.answered_pairs += len(pairs)
        if isinstance(trailers, dict):
            tally.hits += int(trailers.get("x-cache-hits", 0))
            tally.misses += int(trailers.get("x-cache-misses", 0))
        answers = [(answer.uuid, answer.seniority) for answer in response.batch]
        if answers != [(number, infer_level(*pair)) for number, pair in enumerate(pairs)]:
            tally.wrong_pairs += pairs

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()


def split_randomly(pairs: Pairs, sizes: tuple[int, int], rng: random.Random) -> Iterable[Pairs]:
    """The pairs in requests of random sizes between these two."""
    at = 0
    while at < len(pairs):
        size = rng.randint(*sizes)
        yield pairs[at : at + size]
        at += size
