"""The read path as far as L2: what L1 learns from it."""

import asyncio
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from protos import seniority_pb2 as pb
from services.cache_proxy.cache.entry import FROM_PREVIOUS_VERSION, FreshnessPolicy, pack_entry, today
from services.cache_proxy.cache.key import make_batch_digester, make_digester
from services.cache_proxy.cache.l1 import L1Cache
from services.cache_proxy.cache.memory_store import MemoryStore
from services.cache_proxy.cache.resilient_store import ResilientStore
from services.cache_proxy.cache.store_clock import StoreClock
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.interface import ClaimDeferred
from services.cache_proxy.queue.managed_queue import create_local_queue
from services.cache_proxy.queue.waiters import WaiterRegistry
from services.cache_proxy.resolver import Resolver, ResolveResult
from services.cache_proxy.wire.request_parser import CHUNK_BYTES, CHUNK_PAIRS, parse
from tests.support.replicas import queue_limits, request_context

_DIGEST = make_digester(normalize="fold", secret=None)


class _Path:
    """L1, L2 in memory, and a queue that nobody serves."""

    def __init__(self) -> None:
        metrics, waiters = ProxyMetrics(CollectorRegistry()), WaiterRegistry()
        self.l1 = L1Cache(max_bytes=2**22)
        self.l2 = MemoryStore()
        self.queue = create_local_queue(queue_limits(), on_outcome=waiters.resolve, metrics=metrics)
        self.resolver = Resolver(
            digest_batch=make_batch_digester(normalize="fold", secret=None),
            l1=self.l1,
            store=ResilientStore(self.l2, metrics=metrics),
            waiters=waiters,
            queue=self.queue,
            freshness=FreshnessPolicy(),
            clock=StoreClock(),
        )

    async def ask(self, items: Sequence[bytes]) -> ResolveResult:
        """Ask for what L1 does not know of these."""
        answers = ResolveResult(len(items))
        _, missing = await self.resolver.answer_known(items)
        answers.record("l1", len(items) - len(missing))
        await self.resolver.resolve(
            await parse(items, missing, max_field_bytes=CHUNK_BYTES), request_context(), answers
        )
        return answers


def _items(company: str, count: int = 1) -> list[bytes]:
    return [b"\x12%c%b\x1a\x02%02d" % (len(company), company.encode(), n % 100) for n in range(count)]


async def test_a_new_spelling_of_a_known_pair_is_l2s_to_answer() -> None:
    """It costs no inference, though L1 has never seen its bytes; from then on L1 knows both spellings."""
    path = _Path()
    await path.l2.put({_DIGEST("acme", "00"): 6})
    for spelled, outcome in (("acme", "l2"), ("ACME", "l2"), (" Acme", "l2"), ("ACME", "l1"), ("acme", "l1")):
        answers = await path.ask(_items(spelled))
        counted = {name: count for name, count in answers.outcome_counts().items() if count}
        assert counted == {outcome: 1}, spelled
    assert path.l1.entries == 3


async def test_two_spellings_in_one_request_are_one_look_up_and_both_remembered() -> None:
    """They share the pair's answer, each by its own position."""
    path = _Path()
    await path.l2.put({_DIGEST("acme", "00"): 6})
    answers = await path.ask(_items("acme") + _items("ACME"))
    assert (answers.levels, path.l1.entries) == ([6, 6], 2)


@pytest.mark.parametrize("forget", ["remove", "clear"])
async def test_an_invalidation_under_a_look_up_keeps_its_answer_out_of_l1(forget: str) -> None:
    """What was being looked up when the pair was invalidated is answered, but not remembered."""
    path = _Path()
    await path.l2.put({_DIGEST("acme", "00"): 6})
    items = _items("acme", CHUNK_PAIRS + 1)
    await path.l2.put({_DIGEST("acme", f"{title:02}"): 5 for title in range(1, 100)})
    asked = asyncio.create_task(path.ask(items))
    await asyncio.sleep(0)  # it takes breath, half of its items read,
    await asyncio.sleep(0)  # has its turn,
    await asyncio.sleep(0)  # and takes breath again, its epoch read and half of its digests made
    if forget == "remove":
        path.l1.remove(_DIGEST("acme", "00"))
    else:
        path.l1.clear()
    answers = await asked
    assert answers.outcome_counts()["l2"] == len(items)
    assert path.l1.entries == 0
    await path.ask(items)
    assert path.l1.entries == 100


async def test_long_texts_are_read_hashed_and_remembered_few_at_a_time() -> None:
    """Others have their turn between pairs of the longest texts, in letters that are slow to fold."""
    path = _Path()
    texts = [f"{number:03}" + "é" * (CHUNK_BYTES // 6) for number in range(30)]  # so that a breath has one
    items = [pb.SeniorityRequest(company=text, title=text).SerializeToString() for text in texts]
    await path.l2.put({_DIGEST(text, text): 3 for text in texts})
    asked = asyncio.create_task(path.ask(items))
    turns = 0
    while not asked.done():
        await asyncio.sleep(0)
        turns += 1
    assert (await asked).levels == [3] * 30
    assert turns >= 3 * (len(items) - 1)


async def test_fresh_stale_and_unknown_pairs_of_one_request_each_go_their_way() -> None:
    """Fresh: answered and remembered. Stale: answered, and asked for once. Unknown: asked for first."""
    path = _Path()
    fresh, stale, unknown = (_DIGEST(name, "00") for name in ("fresh", "stale", "unknown"))
    path.l2._entries.update(
        {fresh: pack_entry(6, today()), stale: pack_entry(4, today()) | FROM_PREVIOUS_VERSION}
    )
    items = [_items(name)[0] for name in ("fresh", "stale", "unknown", "STALE", "unknown")]
    asked = asyncio.create_task(path.ask(items))
    claimed: list[bytes] = []
    while len(claimed) < 2:
        claim = await path.queue.claim()
        if isinstance(claim, ClaimDeferred):
            await path.queue.wait_for_change()
        else:
            assert path.l1.entries == 1
            claimed += [pair.digest for pair in claim.pairs]
            await path.queue.complete(claim, {pair.digest: 7 for pair in claim.pairs})
    answers = await asked
    assert answers.levels == [6, 4, 7, 4, 7]
    assert answers.outcome_counts() == {
        "l1": 0,
        "l2": 1,
        "stale": 2,
        "inferred": 1,
        "coalesced": 1,
        "failed": 0,
    }
    assert sorted(claimed) == sorted([stale, unknown])
    assert isinstance(await path.queue.claim(), ClaimDeferred)
    assert path.l1.entries == 2
    await path.resolver.close()
