"""Tests of the queue's state for the status page, from a real Redis and from invalid values in it."""

import math

import msgpack
import pytest
from prometheus_client import CollectorRegistry

from services.cache_proxy.errors import StoreError
from services.cache_proxy.observability.metrics import ProxyMetrics
from services.cache_proxy.queue.managed_queue import create_local_queue
from services.cache_proxy.queue.snapshot import (
    MAX_REPORT_BYTES,
    MAX_REPORTS,
    QueueSnapshot,
    Report,
    decode_snapshot,
)
from tests.support.replicas import QueueLocation, numbered_pairs, queue_limits, replicas, request_context

MINUTES = 3


class FixedReportSource:
    """Source of the same reports, until a test changes them."""

    def __init__(self) -> None:
        self.reports: list[Report] = []

    def pending_reports(self) -> list[Report]:
        """Return, or ignore, as `ReportSource` requires."""
        return self.reports

    def mark_reported(self, reports: list[Report], *, clock_offset_seconds: float) -> None:
        """Return, or ignore, as `ReportSource` requires."""

    def resend_all(self) -> None:
        """Return, or ignore, as `ReportSource` requires."""


async def test_reports_of_heartbeats_are_read_by_all_replicas(shared_redis: str) -> None:
    """A replica's report of a minute is there once, however often it is sent, and a new one replaces it."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 2) as (one, other):
        this = int((await one.queue.snapshot(minutes=MINUTES)).now_seconds // 60)
        for replica, text in ((one, b"one"), (other, b"other")):
            source = FixedReportSource()
            source.reports = [(this, text), (this - 1, text), (this - 1000, b"too old")]
            replica.session._report_source = source  # type: ignore[assignment]
            await replica.heartbeat()
            source.reports[0] = (this, text + b" again")
            for _ in range(2):
                await replica.heartbeat()
        overview = await other.queue.snapshot(minutes=MINUTES)
        assert sorted(overview.reports or ()) == [
            (this - 1, b"one"),
            (this - 1, b"other"),
            (this, b"one again"),
            (this, b"other again"),
        ]
        assert (overview.live_replicas, overview.silent_replicas) == (2, 0)
        other.expire_heartbeat()
        overview = await one.queue.snapshot(minutes=MINUTES)
        assert (overview.live_replicas, overview.silent_replicas) == (1, 1)
        with place.client() as client:
            assert not client.exists(f"{place.keys.limit}:reports:{this - 1000}")
            assert 0 < client.pttl(f"{place.keys.limit}:reports:{this}") <= 12 * 60_000


async def test_invalid_reports_are_left_out(shared_redis: str) -> None:
    """A key of another type, too many fields, and a report that is too long."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (replica,):
        this = int((await replica.queue.snapshot(minutes=MINUTES)).now_seconds // 60)
        key = f"{place.keys.limit}:reports:%d"
        with place.client() as client:
            client.set(key % (this - 1), "text")
            client.hset(key % (this - 2), mapping={f"{n}": "x" for n in range(MAX_REPORTS + 1)})
            client.hset(key % this, mapping={"long": "x" * (MAX_REPORT_BYTES + 1), "fine": "x"})
        overview = await replica.queue.snapshot(minutes=MINUTES)
        assert list(overview.reports or ()) == [(this, b"x")]
        source = FixedReportSource()
        source.reports = [(this - 1, b"mine"), (this - 2, b"mine")]
        replica.session._report_source = source  # type: ignore[assignment]
        await replica.heartbeat()
        overview = await replica.queue.snapshot(minutes=MINUTES)
        assert sorted(overview.reports or ()) == [(this - 1, b"mine"), (this, b"x")]


@pytest.mark.parametrize("value", ["text", "-1", "1e400", "nan", str(2**60), ""])
async def test_invalid_figures_are_unknown(shared_redis: str, value: str) -> None:
    """No figure is negative, infinite or not a number, whatever is in Redis."""
    place = QueueLocation.create(shared_redis)
    async with replicas(place, 1) as (replica,):
        with place.client() as client:
            fields = (
                "pairs_per_second",
                "calls_per_second",
                "pairs_tat",
                "calls_tat",
                "not_before",
                "batch_pairs",
            )
            client.hset(place.keys.limit, mapping=dict.fromkeys(fields, value))
            fields = ("failures", "failed_at", "backoff_until", "pushback_until", "breaking", "probe")
            client.hset(place.keys.model, mapping=dict.fromkeys(fields, value))
        overview = await replica.queue.snapshot(minutes=MINUTES)
        for figure in (
            overview.pairs_per_second,
            overview.calls_per_second,
            overview.failures_in_a_row,
            overview.batch_pairs,
            overview.batch_interval_seconds,
            overview.next_call_seconds,
            *map(overview.wait_seconds, overview.waiting),
        ):
            assert figure is None or (figure >= 0 and math.isfinite(figure))
        assert overview.batch_pairs is None
        assert overview.wait_seconds("bulk") is None


@pytest.mark.parametrize(
    "reply", [None, 7, b"", b"\xc1", msgpack.packb([1, 2]), msgpack.packb([b"x", *[[]] * 10])]
)
def test_invalid_reply_raises_store_error(reply: object) -> None:
    """The page then shows what this replica knows."""
    with pytest.raises(StoreError):
        decode_snapshot(reply)


@pytest.mark.parametrize("kind", ["local", "shared"])
async def test_expected_wait_is_that_of_a_new_pair_of_each_priority(kind: str, shared_redis: str) -> None:
    """Four pairs a call, one of them reserved for bulk, with 40 interactive pairs and one of bulk.

    The next interactive pair goes with call 14, the next of bulk with call 2, and a refresh with call
    11.
    """
    bounds = queue_limits(batch_pairs=4, calls_per_second=1 / 60)

    def judge(overview: QueueSnapshot) -> None:
        assert dict(overview.waiting) == {"interactive": 40, "bulk": 1, "refresh": 0}
        assert overview.batch_interval_seconds
        assert overview.next_call_seconds is not None
        assert overview.batch_interval_seconds == pytest.approx(60 / 0.98, rel=0.01)
        assert 0 <= overview.next_call_seconds <= overview.batch_interval_seconds + 1
        for lane, calls in (("interactive", 14), ("bulk", 2), ("refresh", 11)):
            waits = overview.wait_seconds(lane)
            assert waits == pytest.approx(
                overview.next_call_seconds + (calls - 1) * overview.batch_interval_seconds
            )
        assert overview.calls_per_second == pytest.approx(1 / 60)

    if kind == "local":
        metrics = ProxyMetrics(CollectorRegistry())
        queue = create_local_queue(bounds, on_outcome=lambda *_: None, metrics=metrics)
        await queue.enqueue(numbered_pairs(range(40)), request_context(timeout=9999))
        await queue.enqueue(numbered_pairs([40]), request_context(priority="bulk", timeout=9999))
        judge(await queue.snapshot(minutes=MINUTES))
        return
    async with replicas(QueueLocation.create(shared_redis), 1, bounds) as (replica,):
        await replica.queue.enqueue(numbered_pairs(range(40)), request_context(timeout=9999))
        await replica.queue.enqueue(numbered_pairs([40]), request_context(priority="bulk", timeout=9999))
        judge(await replica.queue.snapshot(minutes=MINUTES))
