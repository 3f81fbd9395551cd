"""Tests of the trace contexts that pass through the queue to the replica that claims the pairs."""

from dataclasses import replace
from typing import Any

import msgpack
import pytest
from prometheus_client import CollectorRegistry

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.interface import MAX_TRACES_PER_PAIR, Claim, RequestContext
from services.cache_proxy.queue.managed_queue import create_local_queue
from services.common.tracing import CONTEXT_BYTES, MAX_LINKS
from tests.support.replicas import (
    QueueLocation,
    numbered_pairs,
    pair_numbers,
    queue_limits,
    replicas,
    request_context,
)

ONE, OTHER = b"1" * CONTEXT_BYTES, b"2" * CONTEXT_BYTES


def _traced(context: bytes, caller: str = "c") -> RequestContext:
    return replace(request_context(caller), trace_context=context)


async def test_claim_of_another_replica_has_trace_contexts(shared_redis: str) -> None:
    """Also of a pair that two requests share.

    A request without a trace adds none, and a released batch keeps them.
    """
    async with replicas(QueueLocation.create(shared_redis), 2, queue_limits(batch_pairs=10)) as (
        queueing,
        claimer,
    ):
        await claimer.enqueue(numbered_pairs([9]))
        await queueing.enqueue(numbered_pairs([1, 2]), _traced(ONE))
        await queueing.enqueue(numbered_pairs([2, 3]), _traced(OTHER, "d"))
        await queueing.enqueue(numbered_pairs([4]))
        claim = await claimer.claim_batch()
        assert sorted(claim.trace_contexts) == [ONE, OTHER]
        await claimer.queue.release(claim)
        assert sorted((await claimer.claim_batch()).trace_contexts) == [ONE, OTHER]


async def test_re_enqueued_pairs_keep_trace_contexts(shared_redis: str) -> None:
    """After a flush the pairs are enqueued again with their contexts."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as [replica]:
        await replica.enqueue(numbered_pairs([1]), _traced(ONE))
        await replica.enqueue(numbered_pairs([2]), _traced(OTHER))
        place.flush()
        await replica.queue.re_enqueue()
        await replica.heartbeat()
        assert sorted((await replica.claim_batch()).trace_contexts) == [ONE, OTHER]


async def test_request_without_trace_adds_no_field(shared_redis: str) -> None:
    """A pair's record has the field only if a caller is traced."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as [replica]:
        await replica.enqueue(numbered_pairs([1]))
        assert _records(place)[0].keys().isdisjoint({b"trace"})
        assert list((await replica.claim_batch()).trace_contexts) == []


async def test_trace_contexts_are_bounded(shared_redis: str) -> None:
    """A pair has a few of its callers' traces, and a batch not many more than a span's links."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1, queue_limits(batch_pairs=100)) as [replica]:
        contexts = [number.to_bytes(CONTEXT_BYTES, "big") for number in range(1, 401)]
        for context in contexts[: 2 * MAX_TRACES_PER_PAIR]:
            await replica.enqueue(numbered_pairs([0]), _traced(context))
        [record] = _records(place)
        assert record[b"trace"] == b"".join(contexts[:MAX_TRACES_PER_PAIR])
        for number in range(1, 100):
            await replica.enqueue(numbered_pairs([number]), _traced(contexts[4 * number]))
        claim = await replica.claim_batch()
        assert len(claim.pairs) == 100
        assert MAX_LINKS <= len(claim.trace_contexts) < MAX_LINKS + MAX_TRACES_PER_PAIR


@pytest.mark.parametrize(
    "trace", [7, 1.5, True, [1, 2], {"a": 1}, "", "short", bytes(range(1, 251)) * 400, None]
)
async def test_invalid_trace_contexts_in_redis_do_not_stop_claim(shared_redis: str, trace: Any) -> None:
    """Hostile bytes come out as a few strings or not at all, also when another request joins the pair."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place) as [replica]:
        await replica.enqueue(numbered_pairs([1]))
        with place.client() as client:
            for digest, packed in client.hgetall(f"{place.keys.base}pairs").items():
                record = msgpack.unpackb(packed, raw=True, strict_map_key=False) | {b"trace": trace}
                client.hset(f"{place.keys.base}pairs", digest, msgpack.packb(record, use_bin_type=False))
        await replica.enqueue(numbered_pairs([1]), _traced(ONE))
        claim = await replica.claim_batch()
        assert pair_numbers(claim) == [1]
        assert len(claim.trace_contexts) <= MAX_TRACES_PER_PAIR
        assert all(len(context) == CONTEXT_BYTES for context in claim.trace_contexts)
        assert replica.metrics.store_garbage._value.get() == 0


async def test_local_queue_claim_has_trace_contexts() -> None:
    """As in the shared queue."""
    ignored: list[tuple[bytes, object]] = []
    queue = create_local_queue(
        queue_limits(batch_pairs=10),
        on_outcome=lambda digest, outcome: ignored.append((digest, outcome)),
        metrics=ProxyMetrics(CollectorRegistry()),
    )
    await queue.enqueue(numbered_pairs([1, 2]), _traced(ONE))
    await queue.enqueue(numbered_pairs([2, 3]), _traced(OTHER, "d"))
    for number in range(2 * MAX_TRACES_PER_PAIR):
        await queue.enqueue(numbered_pairs([4]), _traced(bytes([9, number]) * 12))
    claim = await queue.claim()
    assert isinstance(claim, Claim)
    assert {ONE, OTHER} < set(claim.trace_contexts)
    assert len(set(claim.trace_contexts)) == 2 + MAX_TRACES_PER_PAIR


def _records(place: QueueLocation) -> list[dict[bytes, Any]]:
    with place.client() as client:
        found = client.hvals(f"{place.keys.base}pairs")
    return [msgpack.unpackb(packed, raw=True, strict_map_key=False) for packed in found]
