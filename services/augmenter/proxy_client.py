"""Asks for levels: pairs in batches, together, with retries, and refused pairs told from the others."""

import asyncio
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from grpc import aio

from services.augmenter.jsonl import Pair
from services.augmenter.retry import RetryBudget
from services.augmenter.rpc import PairsRefusedError, SeniorityRpc
from services.augmenter.tasks import together
from services.augmenter.totals import Totals

_RPCS_AT_ONCE = 32
# A gRPC server takes 4 MiB unless it was told otherwise; a character is at most 4 bytes.
_BATCH_CHARACTERS = 768 * 2**10
_KEEPALIVE_MS = 5 * 60 * 1000  # a server with gRPC's own settings drops who pings more often
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_retries", 0),  # ours know the file's budget
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
]


@dataclass(slots=True)
class Answers:
    """Each pair that was asked is in exactly one of the two."""

    levels: dict[Pair, int] = field(default_factory=dict)
    refused: dict[Pair, str] = field(default_factory=dict)


def open_channel(target: str) -> aio.Channel:
    """A channel; it connects when it is first used, and again whenever that is needed."""
    return aio.insecure_channel(target, options=_OPTIONS)


class ProxyClient:
    """Shared by all files: bounds the RPCs that are under way."""

    def __init__(self, rpc: SeniorityRpc, *, batch_size: int, totals: Totals) -> None:
        self._rpc = rpc
        self._batch_size = batch_size
        self._totals = totals
        self._places = asyncio.Semaphore(_RPCS_AT_ONCE)

    async def ask(self, pairs: Iterable[Pair], budget: RetryBudget) -> Answers:
        """The levels of distinct pairs. Raises RpcFailedError."""
        answers = Answers()
        batches = list(self._batches(pairs))
        self._totals.pairs_asked += sum(map(len, batches))
        await together(self._resolve(batch, answers, budget) for batch in batches)
        return answers

    def _batches(self, pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
        batch: list[Pair] = []
        characters = 0
        for pair in pairs:
            size = len(pair[0]) + len(pair[1])
            if batch and (len(batch) == self._batch_size or characters + size > _BATCH_CHARACTERS):
                yield batch
                batch, characters = [], 0
            batch.append(pair)
            characters += size
        if batch:
            yield batch

    async def _resolve(self, batch: Sequence[Pair], answers: Answers, budget: RetryBudget) -> None:
        """Ask, and ask again without the pairs that were refused, until each pair is settled."""
        waiting = [batch]
        tries = itertools.count(1)
        while waiting:
            batch = waiting.pop()
            try:
                levels = await budget.call(partial(self._infer, batch, tries))
            except PairsRefusedError as refusal:
                waiting += _settle(batch, refusal, answers)
            else:
                answers.levels.update(zip(batch, levels, strict=True))

    async def _infer(self, batch: Sequence[Pair], tries: Iterator[int]) -> list[int]:
        # A failed call tells no hits, yet fills the cache: counting the hits of the next would flatter it.
        first = next(tries) == 1
        async with self._places:  # held for one RPC, never while waiting to retry
            return await self._rpc.infer(batch, count_hits=first)


def _settle(batch: Sequence[Pair], refusal: PairsRefusedError, answers: Answers) -> list[Sequence[Pair]]:
    """Note the refused pairs; what is left is to be asked again."""
    if refusal.reasons:
        answers.refused.update((batch[index], reason) for index, reason in refusal.reasons.items())
        rest = [pair for index, pair in enumerate(batch) if index not in refusal.reasons]
        return [rest] if rest else []
    if len(batch) == 1:
        answers.refused[batch[0]] = refusal.message
        return []
    middle = len(batch) // 2  # the server does not say which: halve until it is plain
    return [batch[middle:], batch[:middle]]
