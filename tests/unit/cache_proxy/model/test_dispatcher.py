"""From a claim to its end, step by step: the queue, the store and the model are scripts of the test."""

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

PATIENCE_SECONDS = 20
Answer = Callable[[Sequence[Pair]], list[int | InvalidModelResponseError]]


def claim_of(
    numbers: Sequence[int],
    *,
    name: str = "claim",
    send_in: float = 0.0,
    slot_in: float = 0.5,
    request: str = "",
) -> Claim:
    """A batch whose slot begins in so many seconds."""
    now = time.monotonic()
    return Claim(name, numbered_pairs(numbers), now + send_in, now + slot_in, request_id=request)


class Script:
    """Queue, store and model in one, so that `events` has everything in its order.

    `decisions` are what `claim` returns, one after the other, then `NotYet(inf)` for ever.
    """

    def __init__(self, *decisions: Claim | ClaimDeferred) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.decisions = list(decisions)
        self.claims = 0
        self.store_before_complete = False
        self.known: dict[bytes, int] = {}
        self.look = asyncio.Event()  # the store answers looks once it is set
        self.look.set()
        self.may_be_late = True
        self.answer: Answer = lambda sent: [3] * len(sent)
        self.answering = asyncio.Event()  # the model answers once it is set
        self.answering.set()
        self.leaving_seconds = 0.0
        self.woken = asyncio.Event()
        self.changes = asyncio.Event()

    def note(self, *event: Any) -> None:
        """Note what happened."""
        self.events.append(event)
        self.woken.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to have happened."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                self.woken.clear()
                await self.woken.wait()

    def names(self) -> list[str]:
        """What happened, in its order."""
        return [event[0] for event in self.events]

    def of(self, name: str) -> tuple[Any, ...]:
        """The only event of that name."""
        [found] = [event for event in self.events if event[0] == name]
        return found[1:]

    # the queue
    async def claim(self) -> Claim | ClaimDeferred:
        """See `Queue.claim`."""
        self.claims += 1
        self.woken.set()
        return self.decisions.pop(0) if self.decisions else ClaimDeferred(math.inf)

    async def postpone_slot(self, claim: Claim, *, seconds: float) -> bool:
        """See `Queue.late`."""
        self.note("late", claim.id, seconds)
        return self.may_be_late

    async def release(self, claim: Claim) -> None:
        """See `Queue.put_back`."""
        self.note("put_back", claim.id)

    async def complete(
        self, claim: Claim, outcomes: Mapping[bytes, Outcome], *, inferred: bool = True
    ) -> None:
        """See `Queue.fulfil`."""
        self.note("fulfil", claim.id, dict(outcomes), inferred)

    async def fail(self, claim: Claim, error: ModelUnavailableError, **how: Any) -> None:
        """See `Queue.fail`."""
        self.note("fail", claim.id, error, how)

    async def reject(
        self, claim: Claim, error: PairRejectedError, errors_by_digest: Mapping[bytes, PairRejectedError]
    ) -> None:
        """See `Queue.refuse`."""
        self.note("refuse", claim.id, error, dict(errors_by_digest))

    async def wait_for_change(self) -> None:
        """See `Queue.changed`."""
        await self.changes.wait()
        self.changes.clear()

    # the store
    async def get_levels(self, digests: Sequence[bytes]) -> Sequence[int]:
        """See `GuardedStore.get`."""
        await self.look.wait()
        self.note("looked", len(digests))
        return [self.known.get(digest, 0) for digest in digests]

    async def put(self, levels: Mapping[bytes, int], *, requested_at: float) -> None:
        """See `GuardedStore.put`."""
        self.note("put", dict(levels), requested_at)

    # the model
    def prepare(self, wanted: Sequence[Pair]) -> Sequence[Pair]:
        """See `ModelClient.prepare`."""
        return wanted

    async def send(self, batch: Sequence[Pair]) -> "asyncio.Task[list[int | InvalidModelResponseError]]":
        """See `ModelClient.send`."""
        self.note("sent", [int.from_bytes(item.digest, "big") for item in batch], time.monotonic())
        await asyncio.sleep(self.leaving_seconds)
        return asyncio.create_task(self._answer(batch))

    async def _answer(self, batch: Sequence[Pair]) -> list[int | InvalidModelResponseError]:
        await self.answering.wait()
        return self.answer(batch)


@asynccontextmanager
async def running(script: Script, tracing: Tracing = OFF) -> AsyncIterator[Dispatcher]:
    """A dispatcher at work within the block."""
    dispatcher = Dispatcher(
        queue=cast("Queue", script),
        model=cast("ModelClient", script),
        store=cast("ResilientStore", script),
        replica="r",
        tracing=tracing,
    )
    loop = asyncio.create_task(dispatcher.run())
    try:
        yield dispatcher
    finally:
        await cancel_and_wait([loop])
        await dispatcher.drain(timeout_seconds=PATIENCE_SECONDS)


async def played(script: Script, last: str, tracing: Tracing = OFF) -> Script:
    """The script, when an event of that name has come and the calls are over."""
    async with running(script, tracing):
        await script.until(lambda: last in script.names())
    return script


def raising(error: Exception) -> Answer:
    """A model that ends each call so."""

    def answer(_sent: Sequence[Pair]) -> list[int | InvalidModelResponseError]:
        raise error

    return answer


def failed(code: StatusCode = StatusCode.UNAVAILABLE, **how: Any) -> CallFailedError:
    """A failed call whose message quotes pairs."""
    return CallFailedError(code, "words about a pair", how.pop("retry", None), safe_message="no words", **how)


async def test_a_batch_is_looked_up_sent_answered_and_kept() -> None:
    """Whoever waits hears first, then the store; nothing else happens."""
    before = time.monotonic()
    script = await played(Script(claim_of([1, 2])), "put")
    assert script.names() == ["looked", "sent", "fulfil", "put"]
    levels = {numbered_pair(1).digest: 3, numbered_pair(2).digest: 3}
    assert script.of("fulfil") == ("claim", levels, True)
    kept, asked_at = script.of("put")
    assert kept == levels
    assert before <= asked_at <= script.of("sent")[1]


async def test_on_a_cluster_answers_are_kept_before_they_are_told() -> None:
    """The queue may be lost alone, with what it remembers."""
    script = Script(claim_of([1]))
    script.store_before_complete = True
    assert (await played(script, "fulfil")).names() == ["looked", "sent", "put", "fulfil"]


async def test_what_the_store_knows_by_now_is_not_sent() -> None:
    """Another replica answered it since the look-up: it ends with that level, and counts as no answer of the
    model's.
    """  # noqa: D205 - one thought
    script = Script(claim_of([1, 2, 3]))
    script.known = {numbered_pair(2).digest: 6}
    await played(script, "put")
    assert script.names() == ["looked", "fulfil", "sent", "fulfil", "put"]
    assert script.events[1] == ("fulfil", "claim", {numbered_pair(2).digest: 6}, False)
    assert script.of("sent")[0] == [1, 3]
    assert script.of("put")[0] == {numbered_pair(1).digest: 3, numbered_pair(3).digest: 3}


async def test_a_batch_that_the_store_knows_whole_gives_its_slot_back() -> None:
    """Nothing is sent, and the queue is not told that anything is late."""
    script = Script(claim_of([1], slot_in=-1.0))
    script.known = {numbered_pair(1).digest: 6}
    assert (await played(script, "put_back")).names() == ["looked", "fulfil", "put_back"]


async def test_a_slow_look_holds_no_batch_up() -> None:
    """The slot is now: all pairs are sent, and the look that comes later harms nothing."""
    script = Script(claim_of([1, 2]))
    script.known = {numbered_pair(1).digest: 6}
    script.look.clear()
    async with running(script) as dispatcher:
        await script.until(lambda: "put" in script.names())
        assert dispatcher._lookups
        script.look.set()
        await script.until(lambda: "looked" in script.names())
        await asyncio.sleep(0)
    assert script.of("sent")[0] == [1, 2]
    assert not dispatcher._lookups


async def test_a_batch_does_not_leave_before_it_may() -> None:
    """It is claimed ahead of its slot."""
    claim = claim_of([1], send_in=0.15)
    script = await played(Script(claim), "put")
    assert script.of("sent")[1] >= claim.send_at


async def test_a_late_batch_is_told_before_it_leaves() -> None:
    """So the next slot is as much later."""
    script = await played(Script(claim_of([1], slot_in=-0.3)), "put")
    assert script.names() == ["looked", "late", "sent", "fulfil", "put"]
    assert 0.3 <= script.of("late")[1] < 5


async def test_a_batch_that_may_not_be_late_goes_back() -> None:
    """Others count on its slot already."""
    script = Script(claim_of([1], slot_in=-0.3))
    script.may_be_late = False
    assert (await played(script, "put_back")).names() == ["looked", "late", "put_back"]


async def test_a_batch_that_is_hardly_late_is_not_told() -> None:
    """Pacing makes up for it."""
    script = await played(Script(claim_of([1], slot_in=SLOT_TOLERANCE_SECONDS * 20)), "put")
    assert "late" not in script.names()


async def test_what_leaves_later_than_was_told_is_told_again() -> None:
    """The way to the wire took its time after the batch was ready."""
    script = Script(claim_of([1], slot_in=0.0))
    script.leaving_seconds = 0.2
    await played(script, "put")
    told = [event[2] for event in script.events if event[0] == "late"]
    assert told
    assert told[-1] >= 0.2
    assert script.names()[-3:] == ["late", "fulfil", "put"], "once it has left, it is not put back"


async def test_nonsense_is_told_and_not_kept() -> None:
    """The levels of the others are."""
    nonsense = InvalidModelResponseError("none")
    script = Script(claim_of([1, 2]))
    script.answer = lambda _sent: [5, nonsense]
    await played(script, "put")
    assert script.of("fulfil")[1] == {numbered_pair(1).digest: 5, numbered_pair(2).digest: nonsense}
    assert script.of("put")[0] == {numbered_pair(1).digest: 5}


async def test_a_refused_batch_names_pairs_by_what_was_sent() -> None:
    """Positions are those of the message, not of the claim. The model's message is for its request alone."""
    script = Script(claim_of([1, 2, 3], request="rpc"))
    script.known = {numbered_pair(1).digest: 6}
    own = PairRejectedError(StatusCode.OUT_OF_RANGE, "own", ".title", "own")
    script.answer = raising(BatchRejectedError(StatusCode.OUT_OF_RANGE, "words about both", {1: own}))
    await played(script, "refuse")
    _, error, named = script.of("refuse")
    assert list(named) == [numbered_pair(3).digest]
    for refused, message in ((error, "the model refused the pair"), (named[numbered_pair(3).digest], "own")):
        assert refused.code is StatusCode.OUT_OF_RANGE
        assert refused.redacted_for("another").message == message
        assert refused.redacted_for("rpc").message == "words about both"
    assert (named[numbered_pair(3).digest].field, named[numbered_pair(3).digest].reason) == (".title", "own")
    assert script.names() == ["looked", "fulfil", "sent", "refuse"]


async def test_a_refusal_of_a_lone_pair_is_in_the_models_words() -> None:
    """They can be about that pair alone; a batch of several requests has no words for anybody."""
    for numbers, message in (([1], "words"), ([1, 2], "the model refused the pair")):
        script = Script(claim_of(numbers))
        script.answer = raising(BatchRejectedError(StatusCode.INVALID_ARGUMENT, "words", {}))
        await played(script, "refuse")
        error = script.of("refuse")[1]
        assert error.redacted_for("").message == error.redacted().message == message


@pytest.mark.parametrize("code", list(StatusCode))
async def test_a_failed_call_is_told_as_what_it_was(code: StatusCode) -> None:
    """Only an exception in the model puts its pairs under suspicion. The model's pushback, and that it never
    got the call, are passed on, and its words go to the request whose batch it was.
    """  # noqa: D205 - one thought
    script = Script(claim_of([1, 2], request="rpc"))
    script.answer = raising(failed(code, retry=7.0, unsent=True))
    await played(script, "fail")
    _, error, how = script.of("fail")
    suspicious = code in {StatusCode.UNKNOWN, StatusCode.INTERNAL, StatusCode.DATA_LOSS}
    assert how == {"retry_after_seconds": 7.0, "model_fault": suspicious, "unsent": True}
    assert error.redacted_for("other").message == "no words"
    assert error.redacted_for("rpc").message == "words about a pair"
    assert script.names() == ["looked", "sent", "fail"]


async def test_a_failed_call_with_a_lone_pair_is_told_in_the_models_words() -> None:
    """They can be about that pair alone, so every caller of it may read them."""
    script = Script(claim_of([1]))
    script.answer = raising(failed())
    await played(script, "fail")
    assert script.of("fail")[1].redacted().message == "words about a pair"


async def test_a_defect_on_the_way_to_the_model_fails_the_call_alone() -> None:
    """Its pairs are tried again, and the next batch goes."""
    script = Script(claim_of([1], name="first"), claim_of([2], name="second"))
    prepare = script.prepare

    def broken_once(wanted: Sequence[Pair]) -> Sequence[Pair]:
        script.prepare = prepare  # type: ignore[method-assign]
        raise ZeroDivisionError

    script.prepare = broken_once  # type: ignore[method-assign]
    await played(script, "put")
    name, error, how = script.of("fail")
    assert name == "first"
    assert "ZeroDivisionError" in error.message
    assert not how["model_fault"]
    assert script.of("fulfil")[0] == "second"


async def test_one_batch_is_made_ready_at_a_time_and_many_are_in_flight() -> None:
    """The next is claimed once this one has left, not before, and not only when it is answered."""
    script = Script(claim_of([1], send_in=0.1), claim_of([2], send_in=0.1))
    script.answering.clear()
    async with running(script):
        await script.until(lambda: script.claims == 1)
        assert "sent" not in script.names()
        await script.until(lambda: script.names().count("sent") == 2)
        assert "fulfil" not in script.names()
        script.answering.set()
        await script.until(lambda: script.names().count("put") == 2)


async def test_calls_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is claimed that there is no room for; an answer makes room."""
    monkeypatch.setattr("services.cache_proxy.model.dispatcher._MAX_CALLS_IN_FLIGHT", 2)
    script = Script(*(claim_of([number]) for number in range(1, 4)))
    script.answering.clear()
    async with running(script):
        await script.until(lambda: script.names().count("sent") == 2)
        await asyncio.sleep(0.05)
        assert script.claims == 2
        script.answering.set()
        await script.until(lambda: script.names().count("put") == 3)


@pytest.mark.parametrize("wait_seconds", [0.02, math.inf])
async def test_a_claim_is_tried_again_after_the_wait_or_a_change(wait_seconds: float) -> None:
    """Whichever comes first; with nothing waiting only a change."""
    script = Script(ClaimDeferred(wait_seconds), claim_of([1]))
    async with running(script):
        await script.until(lambda: script.claims == 1)
        if math.isinf(wait_seconds):
            await asyncio.sleep(0.05)
            assert script.claims == 1
            script.changes.set()
        await script.until(lambda: "put" in script.names())


@pytest.mark.parametrize("answers", [True, False])
async def test_the_end_waits_for_calls_in_flight_but_not_for_ever(*, answers: bool) -> None:
    """No answer that the model gave is thrown away; what it does not give in time is."""
    script = Script(claim_of([1]))
    script.answering.clear()
    async with running(script) as dispatcher:
        await script.until(lambda: "sent" in script.names())
        ending = asyncio.create_task(dispatcher.drain(timeout_seconds=PATIENCE_SECONDS if answers else 0.05))
        await asyncio.sleep(0)
        if answers:
            script.answering.set()
        await ending
    assert ("put" in script.names()) is answers


class _Broken:
    """A tracing library that raises: as a span begins, as something is noted, or as it ends."""

    def __init__(self, when: str) -> None:
        self._when = when
        self.is_enabled = True

    def batch_span(self, *_: object, **__: object) -> Any:
        """See `Tracing.batch`."""
        if self._when == "begin":
            raise RuntimeError(self._when)
        return self._span()

    @contextmanager
    def _span(self) -> Iterator[Span]:
        yield cast("Span", self) if self._when == "note" else NOOP_SPAN
        if self._when == "end":
            raise RuntimeError(self._when)

    def set_attributes(self, **_: object) -> None:
        """See `Span.note`."""
        raise RuntimeError(self._when)


@pytest.mark.parametrize("when", ["begin", "note", "end"])
async def test_tracing_that_raises_stops_nothing(when: str, caplog: pytest.LogCaptureFixture) -> None:
    """The batch is answered, the next one too, and the log says what failed."""
    script = Script(claim_of([1]), claim_of([2]))
    async with running(script, cast("Tracing", _Broken(when))):
        await script.until(lambda: script.names().count("put") == 2)
    assert [record for record in caplog.records if record.exc_info]


async def test_an_outage_is_logged_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    """In words that quote no pair, however many calls fail; those that fail together count once."""
    caplog.set_level(logging.INFO)
    script = Script()
    script.decisions = [claim_of([number]) for number in (1, 2, 3)]
    script.answer = raising(failed())
    async with running(script):
        await script.until(lambda: script.names().count("fail") == 3)
        script.answer = lambda sent: [1] * len(sent)
        script.decisions.append(claim_of([4]))
        script.changes.set()
        await script.until(lambda: "put" in script.names())
        script.answer = raising(failed())
        script.decisions.append(claim_of([5]))
        script.changes.set()
        await script.until(lambda: script.names().count("fail") == 4)
    messages = [record.getMessage() for record in caplog.records if record.name.endswith("dispatcher")]
    assert messages == [
        "a call to the model failed, trying again: no words",
        "the model answers again, after 1 failed calls",
        "a call to the model failed, trying again: no words",
    ]
