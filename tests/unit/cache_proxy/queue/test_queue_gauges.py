"""Tests of the gauges of both queues."""

import asyncio

from prometheus_client import CollectorRegistry, Gauge

from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.managed_queue import create_local_queue
from tests.support.replicas import QueueLocation, numbered_pairs, queue_limits, replicas, request_context


async def test_oldest_gauge_of_local_queue_ignores_refreshes() -> None:
    """A refresh may wait for hours by design, and no caller waits for it."""
    metrics = ProxyMetrics(CollectorRegistry())
    queue = create_local_queue(queue_limits(), on_outcome=lambda *_: None, metrics=metrics)
    await queue.enqueue(numbered_pairs([1]), request_context(priority="refresh"))
    await asyncio.sleep(0.005)
    assert _value(metrics.queue_oldest_seconds) == 0
    await queue.enqueue(numbered_pairs([2]), request_context(priority="bulk"))
    await asyncio.sleep(0.005)
    assert _value(metrics.queue_oldest_seconds) > 0


async def test_oldest_gauge_of_shared_queue_ignores_refreshes(shared_redis: str) -> None:
    """Every replica shows the same value, also one without requests."""
    async with replicas(QueueLocation.create(shared_redis), 2) as (replica, other):
        await replica.enqueue(numbered_pairs([1]), request_context(priority="refresh"))
        await asyncio.sleep(0.005)
        await other.heartbeat()
        assert _value(other.metrics.queue_oldest_seconds) == 0
        assert _value(other.metrics.queue_global_pairs.labels("refresh")) == 1
        await replica.enqueue(numbered_pairs([2]), request_context(priority="bulk"))
        await asyncio.sleep(0.005)
        await other.heartbeat()
        assert _value(other.metrics.queue_oldest_seconds) > 0


def _value(gauge: Gauge) -> float:
    [family] = gauge.collect()
    return family.samples[0].value
