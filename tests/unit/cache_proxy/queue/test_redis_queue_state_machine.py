"""Stateful test of several replicas of the shared queue against a simple model.

More than 250 lines: one model has all steps of the test.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from grpc import StatusCode
from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache_proxy.domain import Outcome
from services.cache_proxy.errors import (
    InvalidModelResponseError,
    ModelUnavailableError,
    PairError,
    PairRejectedError,
    StoreError,
)
from services.cache_proxy.queue.interface import Claim, ClaimDeferred
from services.cache_proxy.queue.quotas import Quota, Quotas
from services.cache_proxy.queue.waiters import Waiter
from tests.support.replicas import (
    QueueLocation,
    Replica,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    request_context,
)

# They start and stop real servers, and run many examples.
pytestmark = pytest.mark.slow

BOUNDS = queue_limits(batch_pairs=4)
REFUSED = PairRejectedError(StatusCode.INVALID_ARGUMENT, "bad")
DOWN = ModelUnavailableError("down", retry_after_seconds=1.0)
NUMBERS = range(1, 11)
# The quota is never spent, but pairs of `a` wait in lanes of its account.
QUOTAS = Quotas({"a": Quota("a", pairs_per_second=1e6)})


@dataclass
class _LiveReplica:
    """A replica, its waiting requests and its claims."""

    replica: Replica
    waits: list[Waiter] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)


class QueueStateMachine:
    """Model of the waiting pairs and of the model's answers, one step at a time."""

    def __init__(self, data: st.DataObject, url: str) -> None:
        self._draw = data.draw
        self._place = QueueLocation.create(url)
        self._names = (f"{number:016x}" for number in itertools.count(1))
        self._here: list[_LiveReplica] = []
        self._dead: list[_LiveReplica] = []
        self._given: dict[int, set[Outcome]] = {number: set() for number in NUMBERS}
        # Claims whose pairs other replicas may have claimed since.
        self._excused: set[str] = set()

    async def start(self) -> None:
        """Start three replicas."""
        for _ in range(3):
            await self.join()

    async def join(self) -> None:
        """Start a replica."""
        if len(self._here) < 4:
            self._here.append(
                _LiveReplica(
                    await Replica(self._place, next(self._names), BOUNDS, lambda: QUOTAS).subscribe()
                )
            )

    def _draw_replica(self) -> _LiveReplica:
        return self._draw(st.sampled_from(self._here))

    async def enqueue(self) -> None:
        """Enqueue pairs of a request; some replies may be lost, so that the script runs again."""
        here = self._draw_replica()
        numbers = self._draw(st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=6, unique=True))
        who = request_context(
            self._draw(st.sampled_from("ab")), self._draw(st.sampled_from(["interactive", "bulk", "refresh"]))
        )
        here.replica.client.lost_replies = self._draw(st.sampled_from([0, 0, 0, 1, 3]))
        wait, _ = await here.replica.enqueue(numbered_pairs(numbers), who)
        here.waits.append(wait)

    async def cancel(self) -> None:
        """Cancel a request, whether it was answered or not."""
        here = self._draw_replica()
        if here.waits:
            wait = here.waits.pop(self._draw(st.integers(0, len(here.waits) - 1)))
            here.replica.client.lost_replies = self._draw(st.sampled_from([0, 0, 1]))
            await here.replica.cancel(wait)

    async def claim(self) -> None:
        """Claim a batch; the first replies may be lost, or all of them."""
        here = self._draw_replica()
        lost = self._draw(st.sampled_from([0, 0, 0, 0, 1, 4]))
        here.replica.client.lost_replies = lost
        try:
            claim = await here.replica.queue.claim()
        except StoreError:
            # The claim may have been granted.
            assert lost == 4
            return
        finally:
            here.replica.client.lost_replies = 0
        if isinstance(claim, ClaimDeferred):
            return
        taken = set(pair_numbers(claim))
        assert 0 < len(taken) == len(claim.pairs) <= BOUNDS.batch_pairs
        for other in self._here + self._dead:
            for held in other.claims:
                if held.id not in self._excused:
                    assert not taken & set(pair_numbers(held)), "in two batches at once"
        here.claims.append(claim)

    async def finish_claim(self) -> None:
        """End a batch in one of all ways; the report runs again if its reply is lost."""
        here = self._draw_replica()
        if not here.claims:
            return
        claim = here.claims.pop(self._draw(st.integers(0, len(here.claims) - 1)))
        queue = here.replica.queue
        here.replica.client.lost_replies = self._draw(st.sampled_from([0, 0, 1, 2]))
        how = self._draw(
            st.sampled_from(["fulfil", "fulfil", "put back", "fail", "refuse", "name", "in part"])
        )
        if how in {"fulfil", "in part"}:
            outcomes = self._draw_outcomes(claim)
            if how == "in part":
                outcomes = dict(list(outcomes.items())[: len(outcomes) // 2])
            await queue.complete(claim, outcomes)
            if how == "in part" and len(outcomes) < len(claim.pairs):
                rest = [item for item in claim.pairs if item.digest not in outcomes]
                here.claims.append(Claim(claim.id, rest, claim.send_at, claim.slot_at))
        elif how == "put back":
            await queue.release(claim)
        elif how == "fail":
            await queue.fail(claim, DOWN, retry_after_seconds=0)
            queue.claims.deferral.not_before = 0
        else:
            named = {claim.pairs[0].digest: REFUSED} if how == "name" else {}
            await queue.reject(claim, REFUSED, named)

    def _draw_outcomes(self, claim: Claim) -> dict[bytes, Outcome]:
        outcomes: dict[bytes, Outcome] = {}
        for number, item in zip(pair_numbers(claim), claim.pairs, strict=True):
            level = self._draw(st.integers(0, 7))
            outcomes[item.digest] = level or InvalidModelResponseError("none")
            self._given[number].add(level)
        return outcomes

    async def heartbeat(self) -> None:
        """Send a heartbeat, and recover what it shows to be missed."""
        await self._draw_replica().replica.heartbeat()

    async def receive_messages(self) -> None:
        """Receive messages, or lose them."""
        await self._draw_replica().replica.receive_messages(
            lost=self._draw(st.sampled_from([False, False, True]))
        )

    async def crash(self) -> None:
        """Crash a replica with its requests; its claims are taken back."""
        if len(self._here) > 1:
            here = self._here.pop(self._draw(st.integers(0, len(self._here) - 1)))
            await here.replica.crash()
            self._excused.update(claim.id for claim in here.claims)
            self._dead.append(here)

    async def complete_late(self) -> None:
        """Complete a claim that was taken back, through another replica."""
        if self._dead and self._dead[-1].claims:
            claim = self._dead[-1].claims.pop()
            await self._draw_replica().replica.queue.complete(claim, self._draw_outcomes(claim))

    async def expire_leases(self) -> None:
        """Let every lease expire."""
        self._place.age_claims(60_000)
        self._excused.update(claim.id for here in self._here for claim in here.claims)

    async def release_unlisted_claims(self) -> None:
        """Let time pass, so that a heartbeat takes back claims that its replica does not list."""
        self._place.age_claims(3_000)
        await self._draw_replica().replica.heartbeat()

    async def flush(self) -> None:
        """Delete all keys of the deployment."""
        self._place.flush()
        self._excused.update(claim.id for here in self._here for claim in here.claims)

    async def check(self) -> None:
        """Assert that requests got only outcomes of the model."""
        for here in self._here:
            for digest, outcome in here.replica.resolved:
                number = int.from_bytes(digest, "big")
                assert isinstance(outcome, PairError) or outcome in self._given[number], (number, outcome)
            held = {claim.id for claim in here.claims}
            assert set(here.replica.queue.claims.ids) <= held

    async def finish(self) -> None:
        """Recover all messages, end all claims and answer all pairs; then nothing may be left."""
        for here in self._here:
            for claim in here.claims:
                await here.replica.queue.release(claim)
            here.claims.clear()
        self._place.age_claims(3_000)
        await self._recover()
        first = self._here[0].replica
        last, _ = await first.enqueue(numbered_pairs([99]), request_context())
        self._given[99] = set()
        for _ in range(100):
            for here in self._here:
                here.replica.queue.claims.deferral.not_before = 0
                while isinstance(taken := await here.replica.queue.claim(), Claim):
                    for number in pair_numbers(taken):
                        self._given[number].add(3)
                    await here.replica.queue.complete(taken, {item.digest: 3 for item in taken.pairs})
                await here.replica.receive_messages(lost=True)
                await here.replica.heartbeat()
            if not self._place.leftover_keys():
                break
            # Only a replica with waiting pairs claims, so another request is needed.
            if not last.pending:
                last, _ = await first.enqueue(numbered_pairs([next(self._fresh_numbers)]), request_context())
        await self._recover()
        assert not last.pending
        for here in self._here:
            assert all(not wait.pending for wait in here.waits), "a caller waits for ever"
            assert not here.replica.queue.interest
            assert not here.replica.queue.claims.ids
        assert self._place.leftover_keys() == {}, "something is stuck"
        await self.check()

    async def _recover(self) -> None:
        """Lose all messages; two heartbeats show that."""
        for here in self._here:
            await here.replica.receive_messages(lost=True)
            await here.replica.heartbeat()
            await here.replica.heartbeat()

    @property
    def _fresh_numbers(self) -> "itertools.count[int]":
        number = max(self._given) + 1
        self._given[number] = set()
        return itertools.count(number)

    async def close(self) -> None:
        """Close all connections."""
        for here in self._here:
            await here.replica.close_connections()


async def _run_state_machine(data: st.DataObject, url: str) -> None:
    play = QueueStateMachine(data, url)
    await play.start()
    steps: list[Callable[[], Awaitable[None]]] = [
        play.enqueue,
        play.enqueue,
        play.enqueue,
        play.claim,
        play.claim,
        play.claim,
        play.finish_claim,
        play.finish_claim,
        play.finish_claim,
        play.cancel,
        play.receive_messages,
        play.receive_messages,
        play.heartbeat,
        play.crash,
        play.join,
        play.complete_late,
        play.expire_leases,
        play.release_unlisted_claims,
        play.flush,
    ]
    try:
        for step in data.draw(st.lists(st.sampled_from(steps), max_size=50)):
            await step()
            await play.check()
        await play.finish()
    finally:
        await play.close()


@settings(max_examples=60)
@given(data=st.data())
def test_every_request_ends_and_nothing_is_left_after_any_losses(
    data: st.DataObject, shared_redis: str
) -> None:
    """In any order of requests, claims, crashes and losses.

    No pair is in two batches at once, and no answer is made up.
    """
    asyncio.run(_run_state_machine(data, shared_redis))
