"""Caller quotas in a fleet: they hold at the model, also without Redis, and do not affect other callers."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from services.common.tasks import cancel_and_wait
from tests.support.call_log import LoggedCall
from tests.support.caller import make_pairs, open_caller, read_metrics
from tests.support.fleet import Fleet
from tests.support.load_callers import LoadCaller, LoadStats
from tests.support.processes import ServiceProcess
from tests.support.redis_server import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone]

BATCH_PAIRS = 100
CALLS_PER_SECOND = 4
QUOTA_PAIRS_PER_SECOND = 40
FLAGS = (
    "--model-batch-size",
    str(BATCH_PAIRS),
    "--model-rate",
    str(BATCH_PAIRS * CALLS_PER_SECOND),
    "--model-calls-per-second",
    str(CALLS_PER_SECOND),
    "--model-deadline",
    "5s",
)
# A burst of one and a half slots is allowed, which is less.
BURST_SECONDS = 1.0
# Pairs in the queue, of all callers of one kind.
BACKLOG_PAIRS = 400
# See `MAX_LIMIT_EXCESS_SECONDS` of test_rate_limit.py.
MAX_EXCESS_SECONDS = 0.15


def _pair_counts(calls: Sequence[LoggedCall], company: str) -> list[tuple[float, int]]:
    return [(call.unix_seconds, sum(name.startswith(company) for name, _ in call.pairs)) for call in calls]


def _max_excess_seconds(events: Sequence[tuple[float, int]], burst_seconds: float) -> float:
    """Return by how many seconds a time window is too short for its pairs, at most."""
    excess_seconds = 0.0
    for first, (window_start, _) in enumerate(events):
        total = 0
        for at, count in events[first:]:
            total += count
            allowed_after = total / QUOTA_PAIRS_PER_SECOND - burst_seconds
            excess_seconds = max(excess_seconds, allowed_after - (at - window_start))
    return excess_seconds


@pytest.fixture
def quotas(tmp_path: Path) -> Path:
    """Return the path of a quota file with one limited caller and a quota that all unlisted callers share."""
    path = tmp_path / "quotas.json"
    path.write_text(
        json.dumps(
            {
                "callers": {"held": {"pairs_per_second": QUOTA_PAIRS_PER_SECOND}, "free": {}},
                "others": {"pairs_per_second": QUOTA_PAIRS_PER_SECOND},
            }
        )
    )
    return path


@asynccontextmanager
async def _backlog_of(
    callers: Sequence[tuple[str, str]], company: str, stats: LoadStats
) -> AsyncIterator[None]:
    """Send new pairs from callers, each with a name and a target, until the block ends."""
    opened = [LoadCaller([target], name, stats) for name, target in callers]
    size = max(1, BACKLOG_PAIRS // len(opened))
    tasks = [
        asyncio.create_task(_send_forever(caller, f"{company} {number}", size=size))
        for number, caller in enumerate(opened)
    ]
    try:
        yield
    finally:
        await cancel_and_wait(tasks)
        for caller in opened:
            await caller.close()


async def _send_forever(caller: LoadCaller, company: str, *, size: int) -> None:
    for number in itertools.count():
        await caller.infer(make_pairs(f"{company} {number}", size), timeout_seconds=60)


@pytest.mark.parametrize(
    ("redis_program", "names"),
    [("redis", ["held"] * 4), ("valkey", [f"made up {number}" for number in range(40)])],
    indirect=["redis_program"],
)
async def test_quota_holds_over_the_fleet_without_harm_to_other_callers(
    fleet: Fleet, quotas: Path, names: list[str]
) -> None:
    """A caller with a backlog at both replicas gets its quota, and never more in any time window.

    The same holds for a caller that uses forty made-up names. Another caller's backlog fills each call.
    """
    one, other = (
        proxy.target for proxy in fleet.start_replicas(2, *FLAGS, "--caller-quotas-file", str(quotas))
    )
    stats = LoadStats()
    held = list(zip(names, itertools.cycle((one, other)), strict=False))
    free = [("free", one), ("free", other)] * 3
    async with _backlog_of(held, "held", stats), _backlog_of(free, "free", stats):
        await _wait_for_calls(fleet, 22)
        calls = fleet.model_calls[2:]
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    events = _pair_counts(calls, "held")
    assert _max_excess_seconds(events, BURST_SECONDS) <= MAX_EXCESS_SECONDS
    elapsed_seconds = events[-1][0] - events[0][0]
    used_pairs = sum(count for _, count in events[1:])
    assert used_pairs >= 0.85 * QUOTA_PAIRS_PER_SECOND * elapsed_seconds
    assert all(len(call.pairs) == BATCH_PAIRS for call in calls)


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_quota_holds_while_redis_is_lost(fleet: Fleet, quotas: Path) -> None:
    """Each replica keeps its share. Failover and return cost one more burst each at most."""
    targets = [proxy.target for proxy in fleet.start_replicas(2, *FLAGS, "--caller-quotas-file", str(quotas))]
    stats = LoadStats()
    async with _backlog_of([("held", target) for target in targets], "held", stats):
        await _wait_for_calls(fleet, 4)
        await asyncio.to_thread(fleet.redis.kill)
        await _wait_for_calls(fleet, len(fleet.model_calls) + 6)
        await asyncio.to_thread(fleet.redis.start)
        await _wait_for_calls(fleet, len(fleet.model_calls) + 6)
        calls = fleet.model_calls
    assert (stats.wrong_pairs, stats.errors) == ([], [])
    assert _max_excess_seconds(_pair_counts(calls, "held"), 3 * BURST_SECONDS) <= MAX_EXCESS_SECONDS


async def _wait_for_calls(fleet: Fleet, count: int) -> None:
    await asyncio.to_thread(
        wait_for, lambda: len(fleet.model_calls) >= count, timeout_seconds=60, description="enough calls"
    )


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
def test_request_over_quota_is_rejected_at_once_with_pushback(fleet: Fleet, quotas: Path) -> None:
    """The status names the quota and has a pushback, and the rejection is counted.

    A changed quota file is applied without a restart, and a broken one changes nothing.
    """
    quotas.write_text('{"callers": {"held": {"pairs_per_second": 5, "queued_pairs": 100}}}')
    proxy = fleet.start_replica(*FLAGS, "--caller-quotas-file", str(quotas))
    metadata = [("x-caller", "held")]
    with open_caller(proxy.target) as caller:
        many = caller.infer(make_pairs("many", 101), metadata=metadata)
        late = caller.infer(make_pairs("late", 50), metadata=metadata, timeout_seconds=5)
        for reply, quota in ((many, "queued_pairs"), (late, "pairs_per_second")):
            assert reply.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"quota {quota} of caller 'held'" in reply.message
            assert reply.pushback_ms
            assert read_metrics(proxy.http_url)["cache_proxy_quota_refused_total", "held", quota] == 1
        assert not fleet.model_calls
        for outcome, text in (("failed", "{"), ("done", "{}")):
            quotas.write_text(text)
            _wait_for_change(proxy, outcome)
            refused = caller.infer(make_pairs(outcome, 101), metadata=metadata).code is not grpc.StatusCode.OK
            assert refused is (outcome == "failed")
    assert sum("going on with what was there before" in line for line in proxy.log_lines) == 1


def _wait_for_change(proxy: ServiceProcess, outcome: str) -> None:
    changes = ("cache_proxy_renewals_total", "caller_quotas", outcome)
    wait_for(
        lambda: read_metrics(proxy.http_url)[changes] == 1,
        timeout_seconds=30,
        description="the change is noticed",
    )
