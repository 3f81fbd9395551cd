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
_AGAIN = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


@dataclass
class Tally:
    """What callers saw. `seconds` has one entry for each RPC that was answered, its retries in it."""

    answered: int = 0
    wrong: list[tuple[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    retries: int = 0
    hits: int = 0
    misses: int = 0
    seconds: list[float] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Seconds within which that share of the RPCs was answered."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


class LoadCaller:
    """One caller. It goes round the replicas when one is gone, as a balanced channel would."""

    def __init__(self, targets: Sequence[str], name: str, tally: Tally) -> None:
        self._channels = [aio.insecure_channel(target, options=_OPTIONS) for target in targets]
        self._stubs = [seniority_pb2_grpc.SeniorityModelStub(channel) for channel in self._channels]
        self._name = name
        self._tally = tally
        self._at = 0

    async def ask(
        self, pairs: Pairs, *, seconds: float = 120, priority: str = "interactive", attempts: int = 60
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
        for attempt in range(1, attempts + 1):
            stub = self._stubs[self._at % len(self._stubs)]
            call = stub.InferSeniority(request, timeout=seconds, metadata=metadata)
            try:
                response = await call
            except aio.AioRpcError as error:
                if error.code() not in _AGAIN or attempt == attempts:
                    self._tally.failed.append(f"{error.code().name}: {error.details()}")
                    return
                self._tally.retries += 1
                self._at += 1
                trailers = dict(error.trailing_metadata() or ())
                await asyncio.sleep(int(trailers.get("grpc-retry-pushback-ms", 100)) / 1000)
            else:
                self._take(pairs, response, dict(await call.trailing_metadata()), began)
                return

    def _take(
        self, pairs: Pairs, response: pb.SeniorityResponseBatch, trailers: object, began: float
    ) -> None:
        tally = self._tally
        tally.seconds.append(time.monotonic() - began)
        tally.answered += len(pairs)
        if isinstance(trailers, dict):
            tally.hits += int(trailers.get("x-cache-hits", 0))
            tally.misses += int(trailers.get("x-cache-misses", 0))
        answers = [(answer.uuid, answer.seniority) for answer in response.batch]
        if answers != [(number, infer_level(*pair)) for number, pair in enumerate(pairs)]:
            tally.wrong += pairs

    async def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            await channel.close()


def cut(pairs: Pairs, sizes: tuple[int, int], dice: random.Random) -> Iterable[Pairs]:
    """The pairs in requests of random sizes between these two."""
    at = 0
    while at < len(pairs):
        size = dice.randint(*sizes)
        yield pairs[at : at + size]
        at += size
