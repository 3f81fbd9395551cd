"""The dispatcher, with a scripted queue, store and model that record every event."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, cast

import pytest
from grpc import StatusCode

from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.domain import Outcome, Pair
from services.cache_proxy.errors import (
    BatchRejectedError,
    CallFailedError,
    InvalidModelResponseError,
    ModelUnavailableError,
    PairRejectedError,
)
from services.cache_proxy.model.client import ModelClient
from services.cache_proxy.model.dispatcher import Dispatcher
from services.cache_proxy.queue.interface import SLOT_TOLERANCE_SECONDS, Claim, ClaimDeferred, Queue
from services.common.tasks import cancel_and_wait
from services.common.tracing import NOOP_SPAN, OFF, Span, Tracing
from tests.support.replicas import numbered_pair, numbered_pairs

TIMEOUT_SECONDS = 20
Answer = Callable[[Sequence[Pair]], list[int | InvalidModelResponseError]]


def make_claim(
    numbers: Sequence[int],
    *,
    name: str = "claim",
    send_in: float = 0.0,
    slot_in: float = 0.5,
    request: str = "",
) -> Claim:
    """Return a claim of numbered pairs whose slot begins in `slot_in` seconds."""
    now = time.monotonic()
    return Claim(name, numbered_pairs(numbers), now + send_in, now + slot_in, request_id=request)


class ScriptedBackends:
    """A queue, a store and a model in one object, so that `events` are in one order.

    `decisions` are what `claim` returns, one after the other, and then `ClaimDeferred(inf)` forever.
    """

    def __init__(self, *decisions: Claim | ClaimDeferred) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.decisions = list(decisions)
        self.claims = 0
        self.store_before_complete = False
        self.known: dict[bytes, int] = {}
        # The store answers lookups once this is set.
        self.lookups_allowed = asyncio.Event()
        self.lookups_allowed.set()
        self.can_postpone = True
        self.answer: Answer = lambda sent: [3] * len(sent)
        # The model answers once this is set.
        self.answers_allowed = asyncio.Event()
        self.answers_allowed.set()
        self.send_seconds = 0.0
        self.new_event = asyncio.Event()
        self.changes = asyncio.Event()

    def record(self, *event: Any) -> None:
        """Record an event."""
        self.events.append(event)
        self.new_event.set()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds after some event."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not condition():
                self.new_event.clear()
                await self.new_event.wait()

    def event_names(self) -> list[str]:
        """Return the names of all events in their order."""
        return [event[0] for event in self.events]

    def only_event(self, name: str) -> tuple[Any, ...]:
        """Return the arguments of the only event of a name."""
        [found] = [event for event in self.events if event[0] == name]
        return found[1:]

    # The methods of the queue.
    async def claim(self) -> Claim | ClaimDeferred:
        """Return the next decision, as `Queue.claim`."""
        self.claims += 1
        self.new_event.set()
        return self.decisions.pop(0) if self.decisions else ClaimDeferred(math.inf)

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """Record the call, as `Queue.postpone_slot`."""
        self.record("postpone_slot", claim.id, seconds)
        return self.can_postpone

    async def release(self, claim: Claim) -> None:
        """Record the call, as `Queue.release`."""
        self.record("release", claim.id)

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """Record the call, as `Queue.complete`."""
        self.record("complete", claim.id, dict(outcomes), inferred)

    async def fail(self, claim: Claim, error: ModelUnavailableError, **options: Any) -> None:
        """Record the call, as `Queue.fail`."""
        self.record("fail", claim.id, error, options)

    async def reject(
        self, claim: Claim, error: PairRejectedError, errors_by_digest: Mapping[bytes, PairRejectedError]
    ) -> None:
        """Record the call, as `Queue.reject`."""
        self.record("reject", claim.id, error, dict(errors_by_digest))

    async def wait_for_change(self) -> None:
        """Wait until the test sets `changes`, as `Queue.wait_for_change`."""
        await self.changes.wait()
        self.changes.clear()

    # The methods of the store.
    async def get_levels(self, digests: Sequence[bytes]) -> Sequence[int]:
        """Return the known levels once `lookups_allowed` is set, as `ResilientStore.get_levels`."""
        await self.lookups_allowed.wait()
        self.record("lookup", len(digests))
        return [self.known.get(digest, 0) for digest in digests]

    async def put(self, levels: Mapping[bytes, int], *, requested_at: float) -> None:
        """Record the call, as `ResilientStore.put`."""
        self.record("put", dict(levels), requested_at)

    # The methods of the model client.
    def prepare(self, wanted: Sequence[Pair]) -> Sequence[Pair]:
        """Return the pairs, as `ModelClient.prepare`."""
        return wanted

    async def send(self, batch: Sequence[Pair]) -> "asyncio.Task[list[int | InvalidModelResponseError]]":
        """Record the call, and answer once `answers_allowed` is set, as `ModelClient.send`."""
        self.record("sent", [int.from_bytes(item.digest, "big") for item in batch], time.monotonic())
        await asyncio.sleep(self.send_seconds)
        return asyncio.create_task(self._answer(batch))

    async def _answer(self, batch: Sequence[Pair]) -> list[int | InvalidModelResponseError]:
        await self.answers_allowed.wait()
        return self.answer(batch)


@asynccontextmanager
async def running_dispatcher(backends: ScriptedBackends, tracing: Tracing = OFF) -> AsyncIterator[Dispatcher]:
    """Run a dispatcher during the block."""
    dispatcher = Dispatcher(
        queue=cast("Queue", backends),
        model=cast("ModelClient", backends),
        store=cast("ResilientStore", backends),
        replica="r",
        tracing=tracing,
    )
    loop = asyncio.create_task(dispatcher.run())
    try:
        yield dispatcher
    finally:
        await cancel_and_wait([loop])
        await dispatcher.drain(timeout_seconds=TIMEOUT_SECONDS)


async def run_until(backends: ScriptedBackends, last: str, tracing: Tracing = OFF) -> ScriptedBackends:
    """Run a dispatcher until the last event has come and all calls have ended."""
    async with running_dispatcher(backends, tracing):
        await backends.wait_until(lambda: last in backends.event_names())
    return backends


def answer_with_error(error: Exception) -> Answer:
    """Return a model behaviour that fails every call."""

    def answer(_sent: Sequence[Pair]) -> list[int | InvalidModelResponseError]:
        raise error

    return answer


def call_failed(code: StatusCode = StatusCode.UNAVAILABLE, **options: Any) -> CallFailedError:
    """Return the error of a failed call whose message quotes pairs."""
    return CallFailedError(
        code, "words about a pair", options.pop("retry", None), safe_message="no words", **options
    )


async def test_batch_is_looked_up_sent_completed_and_stored() -> None:
    """Waiting requests get their answer before the store does, and nothing else happens."""
    before = time.monotonic()
    backends = await run_until(ScriptedBackends(make_claim([1, 2])), "put")
    assert backends.event_names() == ["lookup", "sent", "complete", "put"]
    levels = {numbered_pair(1).digest: 3, numbered_pair(2).digest: 3}
    assert backends.only_event("complete") == ("claim", levels, True)
    stored, requested_at = backends.only_event("put")
    assert stored == levels
    assert before <= requested_at <= backends.only_event("sent")[1]


async def test_store_before_complete_puts_levels_first() -> None:
    """A Cluster may lose the queue alone, with its recent outcomes."""
    backends = ScriptedBackends(make_claim([1]))
    backends.store_before_complete = True
    assert (await run_until(backends, "complete")).event_names() == ["lookup", "sent", "put", "complete"]


async def test_pair_answered_since_lookup_is_completed_and_not_sent() -> None:
    """The pair ends with the level from the store, which does not count as an answer of the model."""
    backends = ScriptedBackends(make_claim([1, 2, 3]))
    backends.known = {numbered_pair(2).digest: 6}
    await run_until(backends, "put")
    assert backends.event_names() == ["lookup", "complete", "sent", "complete", "put"]
    assert backends.events[1] == ("complete", "claim", {numbered_pair(2).digest: 6}, False)
    assert backends.only_event("sent")[0] == [1, 3]
    assert backends.only_event("put")[0] == {numbered_pair(1).digest: 3, numbered_pair(3).digest: 3}


async def test_batch_with_all_pairs_in_store_is_released() -> None:
    """Nothing is sent, and no slot is postponed."""
    backends = ScriptedBackends(make_claim([1], slot_in=-1.0))
    backends.known = {numbered_pair(1).digest: 6}
    assert (await run_until(backends, "release")).event_names() == ["lookup", "complete", "release"]


async def test_slow_store_lookup_does_not_delay_batch() -> None:
    """All pairs are sent when the slot begins, and the late lookup has no effect."""
    backends = ScriptedBackends(make_claim([1, 2]))
    backends.known = {numbered_pair(1).digest: 6}
    backends.lookups_allowed.clear()
    async with running_dispatcher(backends) as dispatcher:
        await backends.wait_until(lambda: "put" in backends.event_names())
        assert dispatcher._lookups
        backends.lookups_allowed.set()
        await backends.wait_until(lambda: "lookup" in backends.event_names())
        await asyncio.sleep(0)
    assert backends.only_event("sent")[0] == [1, 2]
    assert not dispatcher._lookups


async def test_batch_is_not_sent_before_its_slot() -> None:
    """A batch is claimed ahead of its slot."""
    claim = make_claim([1], send_in=0.15)
    backends = await run_until(ScriptedBackends(claim), "put")
    assert backends.only_event("sent")[1] >= claim.send_at


async def test_late_batch_postpones_slot_before_it_is_sent() -> None:
    """The next slot begins later by the same time."""
    backends = await run_until(ScriptedBackends(make_claim([1], slot_in=-0.3)), "put")
    assert backends.event_names() == ["lookup", "postpone_slot", "sent", "complete", "put"]
    assert 0.3 <= backends.only_event("postpone_slot")[1] < 5


async def test_late_batch_is_released_if_slot_cannot_be_postponed() -> None:
    """Other calls rely on the next slot already."""
    backends = ScriptedBackends(make_claim([1], slot_in=-0.3))
    backends.can_postpone = False
    assert (await run_until(backends, "release")).event_names() == ["lookup", "postpone_slot", "release"]


async def test_batch_within_slot_tolerance_does_not_postpone_slot() -> None:
    """The reserve in the rate limit makes up for a small delay."""
    backends = await run_until(ScriptedBackends(make_claim([1], slot_in=SLOT_TOLERANCE_SECONDS * 20)), "put")
    assert "postpone_slot" not in backends.event_names()


async def test_delay_while_sending_postpones_slot_again() -> None:
    """Sending the prepared batch took time of its own."""
    backends = ScriptedBackends(make_claim([1], slot_in=0.0))
    backends.send_seconds = 0.2
    await run_until(backends, "put")
    postponed = [event[2] for event in backends.events if event[0] == "postpone_slot"]
    assert postponed
    assert postponed[-1] >= 0.2
    assert backends.event_names()[-3:] == ["postpone_slot", "complete", "put"], (
        "a batch that was sent is not released"
    )


async def test_invalid_model_response_completes_pair_and_is_not_stored() -> None:
    """The levels of the other pairs are stored."""
    invalid = InvalidModelResponseError("none")
    backends = ScriptedBackends(make_claim([1, 2]))
    backends.answer = lambda _sent: [5, invalid]
    await run_until(backends, "put")
    assert backends.only_event("complete")[1] == {
        numbered_pair(1).digest: 5,
        numbered_pair(2).digest: invalid,
    }
    assert backends.only_event("put")[0] == {numbered_pair(1).digest: 5}


async def test_rejection_maps_positions_of_sent_pairs() -> None:
    """Positions are those of the request, not of the claim.

    Only the request of the batch gets the whole message.
    """
    backends = ScriptedBackends(make_claim([1, 2, 3], request="rpc"))
    backends.known = {numbered_pair(1).digest: 6}
    own = PairRejectedError(StatusCode.OUT_OF_RANGE, "own", ".title", "own")
    backends.answer = answer_with_error(
        BatchRejectedError(StatusCode.OUT_OF_RANGE, "words about both", {1: own})
    )
    await run_until(backends, "reject")
    _, error, errors_by_digest = backends.only_event("reject")
    assert list(errors_by_digest) == [numbered_pair(3).digest]
    named = errors_by_digest[numbered_pair(3).digest]
    for rejected, message in (
        (error, "the model refused the pair"),
        (errors_by_digest[numbered_pair(3).digest], "own"),
    ):
        assert rejected.code is StatusCode.OUT_OF_RANGE
        assert rejected.redacted_for("another").message == message
        assert rejected.redacted_for("rpc").message == "words about both"
    assert (named.field, named.reason) == (".title", "own")
    assert backends.event_names() == ["lookup", "complete", "sent", "reject"]


async def test_rejection_of_lone_pair_keeps_model_message() -> None:
    """The message can only be about that pair. With several requests in a batch, no caller gets it."""
    for numbers, message in (([1], "words"), ([1, 2], "the model refused the pair")):
        backends = ScriptedBackends(make_claim(numbers))
        backends.answer = answer_with_error(BatchRejectedError(StatusCode.INVALID_ARGUMENT, "words", {}))
        await run_until(backends, "reject")
        error = backends.only_event("reject")[1]
        assert error.redacted_for("").message == error.redacted().message == message


@pytest.mark.parametrize("code", list(StatusCode))
async def test_failed_call_passes_on_fault_pushback_and_unsent(code: StatusCode) -> None:
    """Only an exception in the model puts its pairs under suspicion.

    Pushback and `unsent` are passed on, and the message goes to the request of the batch only.
    """
    backends = ScriptedBackends(make_claim([1, 2], request="rpc"))
    backends.answer = answer_with_error(call_failed(code, retry=7.0, unsent=True))
    await run_until(backends, "fail")
    _, error, options = backends.only_event("fail")
    is_model_fault = code in {StatusCode.UNKNOWN, StatusCode.INTERNAL, StatusCode.DATA_LOSS}
    assert options == {"retry_after_seconds": 7.0, "model_fault": is_model_fault, "unsent": True}
    assert error.redacted_for("other").message == "no words"
    assert error.redacted_for("rpc").message == "words about a pair"
    assert backends.event_names() == ["lookup", "sent", "fail"]


async def test_failed_call_with_lone_pair_keeps_model_message() -> None:
    """The message can only be about that pair, so every caller of the pair may read it."""
    backends = ScriptedBackends(make_claim([1]))
    backends.answer = answer_with_error(call_failed())
    await run_until(backends, "fail")
    assert backends.only_event("fail")[1].redacted().message == "words about a pair"


async def test_exception_before_sending_fails_one_call_only() -> None:
    """Its pairs are tried again, and the next batch is sent."""
    backends = ScriptedBackends(make_claim([1], name="first"), make_claim([2], name="second"))
    prepare = backends.prepare

    def fail_once(wanted: Sequence[Pair]) -> Sequence[Pair]:
        backends.prepare = prepare  # type: ignore[method-assign]
        raise ZeroDivisionError

    backends.prepare = fail_once  # type: ignore[method-assign]
    await run_until(backends, "put")
    name, error, options = backends.only_event("fail")
    assert name == "first"
    assert "ZeroDivisionError" in error.message
    assert not options["model_fault"]
    assert backends.only_event("complete")[0] == "second"


async def test_next_batch_is_claimed_once_previous_one_was_sent() -> None:
    """It is not claimed earlier, and does not wait for the answer to the previous one."""
    backends = ScriptedBackends(make_claim([1], send_in=0.1), make_claim([2], send_in=0.1))
    backends.answers_allowed.clear()
    async with running_dispatcher(backends):
        await backends.wait_until(lambda: backends.claims == 1)
        assert "sent" not in backends.event_names()
        await backends.wait_until(lambda: backends.event_names().count("sent") == 2)
        assert "complete" not in backends.event_names()
        backends.answers_allowed.set()
        await backends.wait_until(lambda: backends.event_names().count("put") == 2)


async def test_concurrent_calls_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is claimed beyond the limit until an answer comes."""
    monkeypatch.setattr("services.cache_proxy.model.dispatcher._MAX_CALLS_IN_FLIGHT", 2)
    backends = ScriptedBackends(*(make_claim([number]) for number in range(1, 4)))
    backends.answers_allowed.clear()
    async with running_dispatcher(backends):
        await backends.wait_until(lambda: backends.event_names().count("sent") == 2)
        await asyncio.sleep(0.05)
        assert backends.claims == 2
        backends.answers_allowed.set()
        await backends.wait_until(lambda: backends.event_names().count("put") == 3)


@pytest.mark.parametrize("wait_seconds", [0.02, math.inf])
async def test_deferred_claim_is_retried_after_wait_or_change(wait_seconds: float) -> None:
    """With an empty queue only a change leads to a retry."""
    backends = ScriptedBackends(ClaimDeferred(wait_seconds), make_claim([1]))
    async with running_dispatcher(backends):
        await backends.wait_until(lambda: backends.claims == 1)
        if math.isinf(wait_seconds):
            await asyncio.sleep(0.05)
            assert backends.claims == 1
            backends.changes.set()
        await backends.wait_until(lambda: "put" in backends.event_names())


@pytest.mark.parametrize("answers", [True, False])
async def test_drain_waits_for_sent_calls_within_timeout(*, answers: bool) -> None:
    """An answer that arrives in time is stored, a later one is dropped."""
    backends = ScriptedBackends(make_claim([1]))
    backends.answers_allowed.clear()
    async with running_dispatcher(backends) as dispatcher:
        await backends.wait_until(lambda: "sent" in backends.event_names())
        draining = asyncio.create_task(dispatcher.drain(timeout_seconds=TIMEOUT_SECONDS if answers else 0.05))
        await asyncio.sleep(0)
        if answers:
            backends.answers_allowed.set()
        await draining
    assert ("put" in backends.event_names()) is answers


class _FailingTracing:
    """A tracing library that raises when a span begins, gets attributes, or ends."""

    def __init__(self, when: str) -> None:
        self._when = when
        self.is_enabled = True

    def batch_span(self, *_: object, **__: object) -> Any:
        """Begin a span, as `Tracing.batch_span`."""
        if self._when == "begin":
            raise RuntimeError(self._when)
        return self._span()

    @contextmanager
    def _span(self) -> Iterator[Span]:
        yield cast("Span", self) if self._when == "record" else NOOP_SPAN
        if self._when == "end":
            raise RuntimeError(self._when)

    def set_attributes(self, **_: object) -> None:
        """Raise, as a broken `Span.set_attributes`."""
        raise RuntimeError(self._when)


@pytest.mark.parametrize("when", ["begin", "record", "end"])
async def test_failing_tracing_does_not_stop_dispatcher(when: str, caplog: pytest.LogCaptureFixture) -> None:
    """Both batches are answered, and the failure is logged."""
    backends = ScriptedBackends(make_claim([1]), make_claim([2]))
    async with running_dispatcher(backends, cast("Tracing", _FailingTracing(when))):
        await backends.wait_until(lambda: backends.event_names().count("put") == 2)
    assert [record for record in caplog.records if record.exc_info]


async def test_model_outage_is_logged_once_at_start_and_end(caplog: pytest.LogCaptureFixture) -> None:
    """The messages quote no pair, and failures of calls that were sent together count once."""
    caplog.set_level(logging.INFO)
    backends = ScriptedBackends()
    backends.decisions = [make_claim([number]) for number in (1, 2, 3)]
    backends.answer = answer_with_error(call_failed())
    async with running_dispatcher(backends):
        await backends.wait_until(lambda: backends.event_names().count("fail") == 3)
        backends.answer = lambda sent: [1] * len(sent)
        backends.decisions.append(make_claim([4]))
        backends.changes.set()
        await backends.wait_until(lambda: "put" in backends.event_names())
        backends.answer = answer_with_error(call_failed())
        backends.decisions.append(make_claim([5]))
        backends.changes.set()
        await backends.wait_until(lambda: backends.event_names().count("fail") == 4)
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("dispatcher")]
    assert messages == [
        "a call to the model failed, trying again: no words",
        "the model answers again, after 1 failed calls",
        "a call to the model failed, trying again: no words",
    ]
