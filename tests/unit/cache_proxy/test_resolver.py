"""The read path up to L2, and what L1 caches of it."""

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


class _ReadPath:
    """A resolver with L1, an L2 in memory, and a queue without a dispatcher."""

    def __init__(self) -> None:
        metrics = ProxyMetrics(CollectorRegistry())
        waiters = WaiterRegistry()
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

    async def resolve(self, items: Sequence[bytes]) -> ResolveResult:
        """Resolve what L1 does not know of some items."""
        result = ResolveResult(len(items))
        _, missing = await self.resolver.answer_known(items)
        result.record("l1", len(items) - len(missing))
        await self.resolver.resolve(
            await parse(items, missing, max_field_bytes=CHUNK_BYTES), request_context(), result
        )
        return result


def _items(company: str, count: int = 1) -> list[bytes]:
    return [b"\x12%c%b\x1a\x02%02d" % (len(company), company.encode(), n % 100) for n in range(count)]


async def test_new_spelling_of_cached_pair_is_answered_by_l2() -> None:
    """It takes no inference although L1 does not know its bytes. Then L1 knows both spellings."""
    read_path = _ReadPath()
    await read_path.l2.put({_DIGEST("acme", "00"): 6})
    for company, outcome in (("acme", "l2"), ("ACME", "l2"), (" Acme", "l2"), ("ACME", "l1"), ("acme", "l1")):
        result = await read_path.resolve(_items(company))
        counts = {name: count for name, count in result.outcome_counts().items() if count}
        assert counts == {outcome: 1}, company
    assert read_path.l1.entries == 3


async def test_two_spellings_in_one_request_are_looked_up_once() -> None:
    """Both get the answer of the pair, and L1 caches both."""
    read_path = _ReadPath()
    await read_path.l2.put({_DIGEST("acme", "00"): 6})
    result = await read_path.resolve(_items("acme") + _items("ACME"))
    assert (result.levels, read_path.l1.entries) == ([6, 6], 2)


@pytest.mark.parametrize("forget", ["remove", "clear"])
async def test_invalidation_during_lookup_keeps_answer_out_of_l1(forget: str) -> None:
    """The request is still answered."""
    read_path = _ReadPath()
    await read_path.l2.put({_DIGEST("acme", "00"): 6})
    items = _items("acme", CHUNK_PAIRS + 1)
    await read_path.l2.put({_DIGEST("acme", f"{title:02}"): 5 for title in range(1, 100)})
    resolving = asyncio.create_task(read_path.resolve(items))
    # The task yields first when half of its items are parsed, and runs again. It yields the second time when
    # it has read the epoch and made half of its digests.
    for _ in range(3):
        await asyncio.sleep(0)
    if forget == "remove":
        read_path.l1.remove(_DIGEST("acme", "00"))
    else:
        read_path.l1.clear()
    result = await resolving
    assert result.outcome_counts()["l2"] == len(items)
    assert read_path.l1.entries == 0
    await read_path.resolve(items)
    assert read_path.l1.entries == 100


async def test_long_texts_are_processed_in_small_chunks() -> None:
    """Other tasks run between pairs of the longest texts, with characters that are slow to fold."""
    read_path = _ReadPath()
    # A chunk has one such text.
    texts = [f"{number:03}" + "é" * (CHUNK_BYTES // 6) for number in range(30)]
    items = [pb.SeniorityRequest(company=text, title=text).SerializeToString() for text in texts]
    await read_path.l2.put({_DIGEST(text, text): 3 for text in texts})
    resolving = asyncio.create_task(read_path.resolve(items))
    iterations = 0
    while not resolving.done():
        await asyncio.sleep(0)
        iterations += 1
    assert (await resolving).levels == [3] * 30
    assert iterations >= 3 * (len(items) - 1)


async def test_fresh_stale_and_unknown_pairs_in_one_request() -> None:
    """A fresh pair is answered and cached in L1, a stale one is answered and refreshed once.

    An unknown one is queued for the model, before the refresh.
    """
    read_path = _ReadPath()
    fresh, stale, unknown = (_DIGEST(name, "00") for name in ("fresh", "stale", "unknown"))
    read_path.l2._entries.update(
        {fresh: pack_entry(6, today()), stale: pack_entry(4, today()) | FROM_PREVIOUS_VERSION}
    )
    items = [_items(name)[0] for name in ("fresh", "stale", "unknown", "STALE", "unknown")]
    resolving = asyncio.create_task(read_path.resolve(items))
    claimed: list[bytes] = []
    while len(claimed) < 2:
        claim = await read_path.queue.claim()
        if isinstance(claim, ClaimDeferred):
            await read_path.queue.wait_for_change()
        else:
            assert read_path.l1.entries == 1
            claimed += [pair.digest for pair in claim.pairs]
            await read_path.queue.complete(claim, {pair.digest: 7 for pair in claim.pairs})
    result = await resolving
    assert result.levels == [6, 4, 7, 4, 7]
    assert result.outcome_counts() == {
        "l1": 0,
        "l2": 1,
        "stale": 2,
        "inferred": 1,
        "coalesced": 1,
        "failed": 0,
    }
    assert sorted(claimed) == sorted([stale, unknown])
    assert isinstance(await read_path.queue.claim(), ClaimDeferred)
    assert read_path.l1.entries == 2
    await read_path.resolver.close()
