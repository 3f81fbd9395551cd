"""The miss queue: pairs that wait for the model, and the slots in which it may be called.

`Queue` is what the rest of the proxy knows of it. An implementation decides (who waits, what goes into
the next call, when a call is allowed); it never calls the model and never touches the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.cache_proxy.domain import PACE, Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairError

SLOT_TOLERANCE_SECONDS = 0.010
"""How long after its slot began a batch may leave: half of what pacing makes up for."""

MAX_TRACES_PER_PAIR = 4  # of those who wait for one pair, in which its call is named
MAX_FAILED_BATCHES = (
    3  # that one pair may have been in, with others answered in between, before it is suspected
)
MAX_REJECTIONS = 32  # refused batches that one pair may have been in before it is taken for the bad one
INVALID_RESPONSE_TTL_SECONDS = (
    5.0  # for which nonsense is remembered when it comes twice; doubled each time it comes again
)

OutcomeCallback = Callable[[bytes, Outcome], None]
"""Told of every pair that ends, by its digest."""

ModelBackoffCallback = Callable[[float, PairError], None]
"""Told that the model is not called before a moment on the event loop's clock, and why."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Who asks: `deadline` is on the event loop's clock; `trace` as `Tracing.here` gives it, mostly empty.

    `request` names the RPC, as no other one of any replica is named.
    """

    caller: str
    priority: str
    deadline: float
    trace_context: bytes = b""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class EnqueueResult:
    """What became of a request's pairs: ended already, or queued by this very request; the rest joined."""

    outcomes: Mapping[bytes, Outcome]
    queued: frozenset[bytes]


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A batch whose slot is spent: the claimer sends it in time, or says that it is late, or puts it back.

    `traces` are of some who wait for its pairs, as their `Asker` had it, or whatever Redis gave instead.
    `request` is the one that queued all of its pairs, empty if there were several.
    """

    id: str
    pairs: Sequence[Pair]
    send_at: float  # not before, on time.monotonic
    slot_at: float  # when its slot begins, so the latest that it is thought to leave
    trace_contexts: Sequence[bytes] = ()
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class ClaimDeferred:
    """No batch now; ask again after so long, or when the queue changes. `inf`: nothing waits."""

    wait_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueLimits:
    """Bounds of the queue and of the calls; a rate of 0 means no limit."""

    batch_pairs: int
    batch_bytes: int
    pairs_per_second: float
    calls_per_second: float
    linger_seconds: float
    max_pairs: int
    max_bytes: int
    retry_window_seconds: float = 15.0

    @property
    def slot_seconds(self) -> float:
        """How far apart full batches are, as they are spent; 0 if nothing limits them."""
        pairs_rate, calls_rate, batch_pairs = self.paced_limits
        return max(batch_pairs / pairs_rate if pairs_rate else 0.0, 1 / calls_rate if calls_rate else 0.0)

    @property
    def paced_limits(self) -> tuple[float, float, int]:
        """Pairs a second and calls a second as they are spent, a little below the limit; pairs in a batch."""
        return self.pairs_per_second * PACE, self.calls_per_second * PACE, self.batch_pairs


class Queue(Protocol):
    """Each method is one decision: all or nothing, and safe to call from any number of tasks."""

    @property
    def store_before_complete(self) -> bool:
        """Whether answers are kept on other servers than the queue.

        Then they are kept before their pairs end: the queue may be lost alone, with what it remembers of
        those that ended.
        """

    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        """Have pairs wait; one that waits or is in flight already is joined.

        Raises `QueueFullError`, or `ModelUnavailableError` while the model is down or is not called
        before the deadline. Then nothing was queued.
        """

    async def cancel(self, digests: Sequence[bytes]) -> None:
        """Nobody here waits for these any more: those not yet sent are forgotten."""

    async def claim(self) -> Claim | ClaimDeferred:
        """Take the next batch and its slot, if a call is allowed now."""

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """The batch leaves, or left, so long after its slot began: the next slot is as much later. False if
        others count on that slot already: then it must not leave.
        """  # noqa: D205 - one thought

    async def release(self, claim: Claim) -> None:
        """Undo a claim whose batch was not sent: the pairs wait at the front, the slot is free again."""

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """End pairs of a claim and tell whoever waits; those not in `outcomes` are still in flight.

        `inferred`: the model answered; else the store did, which ends no outage.
        """

    async def fail(
        self,
        claim: Claim,
        error: ModelUnavailableError,
        *,
        retry_after_seconds: float | None = None,
        model_fault: bool = False,
        unsent: bool = False,
    ) -> None:
        """The call failed: its pairs are tried again, or end with `error` if the retry window is over.

        `retry_after_seconds` is what the model asked for, None for a backoff that grows. `suspicious`: the
        model broke down in it, perhaps over one of its pairs: then that one is looked for. `unsent`: the
        model never got it, so the slot is free again.
        """

    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        """The model refused the batch: end the pairs that it named. If it named none, one of them is bad:
        find it; the others are none the worse.
        """  # noqa: D205 - one thought

    async def wait_for_change(self) -> None:
        """Return when a claim may be worth trying again."""
