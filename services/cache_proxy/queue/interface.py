"""The miss queue: pairs that wait for the model, and the slots in which it may be called.

`Queue` is all that the rest of the proxy knows of it. An implementation decides which pairs wait, what goes
into the next call, and when a call is allowed. It never calls the model, and never touches the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.cache_proxy.domain import PACE, Outcome, Pair
from services.cache_proxy.errors import ModelUnavailableError, PairError

SLOT_TOLERANCE_SECONDS = 0.010
"""How long after its slot began a batch may leave: half of what pacing makes up for."""

MAX_TRACES_PER_PAIR = 4
"""Waiting requests of one pair whose traces are linked to the call."""

MAX_FAILED_BATCHES = 3
"""Failed batches that a pair may have been in, with others answered in between, before it is suspected."""

MAX_REJECTIONS = 32
"""Rejected batches that a pair may have been in before it is taken for the invalid one."""

INVALID_RESPONSE_TTL_SECONDS = 5.0
"""How long a second invalid response for a pair is remembered. The time doubles with each further one."""

OutcomeCallback = Callable[[bytes, Outcome], None]
"""Called with the digest and outcome of every pair that ends."""

ModelBackoffCallback = Callable[[float, PairError], None]
"""Called with the time on the event loop's clock before which the model is not called, and why."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What the queue needs to know of a request.

    - `deadline`: on the event loop's clock.
    - `trace_context`: the caller's trace as `Tracing.current_context` gives it, empty for most requests.
    - `request_id`: an id of the RPC that no other one has at any replica.
    """

    caller: str
    priority: str
    deadline: float
    trace_context: bytes = b""
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class EnqueueResult:
    """What became of a request's pairs.

    Pairs of `outcomes` had ended already, and those of `queued` were queued by this request. All others
    waited or were in a call, and the request joined them.
    """

    outcomes: Mapping[bytes, Outcome]
    queued: frozenset[bytes]


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A batch whose slot is taken: its owner sends it in time, reports that it is late, or releases it.

    - `send_at`: the time before which it must not be sent, on time.monotonic.
    - `slot_at`: when its slot begins, so the latest time at which it is expected to be sent.
    - `trace_contexts`: traces of some requests that wait for its pairs. From Redis they may be any bytes.
    - `request_id`: the request that queued all of its pairs, empty if there were several.
    """

    id: str
    pairs: Sequence[Pair]
    send_at: float
    slot_at: float
    trace_contexts: Sequence[bytes] = ()
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class ClaimDeferred:
    """No batch may be claimed now.

    Try again after `wait_seconds`, or when the queue changes. It is `inf` while nothing waits.
    """

    wait_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueLimits:
    """Limits of the queue and of the calls to the model. A rate of 0 means no limit."""

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
        """Return the time between two full batches at the paced rate, 0 without a limit."""
        pairs_rate, calls_rate, batch_pairs = self.paced_limits
        return max(batch_pairs / pairs_rate if pairs_rate else 0.0, 1 / calls_rate if calls_rate else 0.0)

    @property
    def paced_limits(self) -> tuple[float, float, int]:
        """Return pairs a second, calls a second, and pairs in a batch.

        The rates are a little below the limits, which makes up for calls that leave late.
        """
        return self.pairs_per_second * PACE, self.calls_per_second * PACE, self.batch_pairs


class Queue(Protocol):
    """The miss queue of one process, or of all replicas.

    Each method is one decision, taken as a whole or not at all. All are safe to call from any number of
    tasks.
    """

    @property
    def store_before_complete(self) -> bool:
        """Return whether answers must be stored before their pairs are completed.

        True where the cache is on other servers than the queue. The queue may then be lost alone, together
        with the outcomes that it remembers, and pairs that are in no store would be inferred again.
        """

    async def enqueue(self, pairs: Sequence[Pair], context: RequestContext) -> EnqueueResult:
        """Let a request's pairs wait for the model; pairs that wait or are in a call already are joined.

        Raises `QueueFullError`, or `ModelUnavailableError` while the model is down or is not called before
        the request's deadline. Then nothing was queued.
        """

    async def cancel(self, digests: Sequence[bytes]) -> None:
        """Drop the pairs for which no request waits here any more, unless they are in a call."""

    async def claim(self) -> Claim | ClaimDeferred:
        """Claim the next batch together with its slot, if a call is allowed now."""

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """Move the next slot by as much as a batch leaves, or left, after its own slot began.

        The last call for a claim counts. Returns False if the next slot is taken already: then the batch must
        not be sent.
        """

    async def release(self, claim: Claim) -> None:
        """Undo a claim whose batch was not sent: its pairs wait at the front, and its slot is free again."""

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """End pairs of a claim with their outcomes; those not in `outcomes` stay in a call.

        `inferred` is False if the cache had the outcomes: that does not show that the model is up again.
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
        """Retry the pairs of a failed call, or end them with `error` if the retry window is over.

        - `retry_after_seconds`: the model's pushback, None for a backoff that grows with each failure.
        - `model_fault`: the model failed on the batch, perhaps on one of its pairs. If that happens again,
          the queue searches for the pair.
        - `unsent`: the model never received the call, so its slot is free again.
        """

    async def reject(
        self, claim: Claim, error: PairError, errors_by_digest: Mapping[bytes, PairError]
    ) -> None:
        """End the pairs that the model named when it rejected a batch.

        If it named none, one of the pairs is invalid: the queue searches for it, and the others are answered.
        """

    async def wait_for_change(self) -> None:
        """Return when a claim may be worth trying again."""
