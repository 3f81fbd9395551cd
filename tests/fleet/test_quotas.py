"""Quotas over a fleet of processes: a ceiling at the model, also without Redis; nobody else is worse off."""

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

BATCH, CALLS_PER_SECOND, QUOTA = 100, 4, 40
FLAGS = (
    "--model-batch-size",
    str(BATCH),
    "--model-rate",
    str(BATCH * CALLS_PER_SECOND),
    "--model-calls-per-second",
    str(CALLS_PER_SECOND),
    "--model-deadline",
    "5s",
)
BURST_SECONDS = 1.0  # one and a half slots are less
BACKLOG = 400  # pairs that wait, of all callers of a kind
SEEN_LATE_SECONDS = 0.15  # see test_paced.py


def _counts(calls: Sequence[LoggedCall], company: str) -> list[tuple[float, int]]:
    return [(call.unix_seconds, sum(name.startswith(company) for name, _ in call.pairs)) for call in calls]


def _most_seconds_over(events: Sequence[tuple[float, int]], burst_seconds: float) -> float:
    """By how much any window is too short for what it holds."""
    worst = 0.0
    for first, (begins, _) in enumerate(events):
        total = 0
        for at, count in events[first:]:
            total += count
            worst = max(worst, total / QUOTA - burst_seconds - (at - begins))
    return worst


@pytest.fixture
def quotas(tmp_path: Path) -> Path:
    """A file with one caller in it, and a quota of all whom it does not name."""
    path = tmp_path / "quotas.json"
    path.write_text(
        json.dumps(
            {
                "callers": {"held": {"pairs_per_second": QUOTA}, "free": {}},
                "others": {"pairs_per_second": QUOTA},
            }
        )
    )
    return path


@asynccontextmanager
async def _asking(callers: Sequence[tuple[str, str]], company: str, tally: LoadStats) -> AsyncIterator[None]:
    """Callers, each with a name and a replica, that ask for new pairs without end, until the block ends."""
    asking = [LoadCaller([target], name, tally) for name, target in callers]
    size = max(1, BACKLOG // len(asking))
    tasks = [
        asyncio.create_task(_keep_asking(one, f"{company} {at}", size=size)) for at, one in enumerate(asking)
    ]
    try:
        yield
    finally:
        await cancel_and_wait(tasks)
        for one in asking:
            await one.close()


async def _keep_asking(one: LoadCaller, company: str, *, size: int) -> None:
    for number in itertools.count():
        await one.infer(make_pairs(f"{company} {number}", size), timeout_seconds=60)


@pytest.mark.parametrize(
    ("redis_program", "names"),
    [("redis", ["held"] * 4), ("valkey", [f"made up {number}" for number in range(40)])],
    indirect=["redis_program"],
)
async def test_a_quota_holds_over_the_fleet_and_others_are_unhurt(
    running: Fleet, quotas: Path, names: list[str]
) -> None:
    """A caller with a backlog at both replicas, or one that calls itself by forty names, sends no more than
    its quota in any window, and nearly that; another with a backlog fills every call.
    """  # noqa: D205 - one thought
    one, other = (
        proxy.target for proxy in running.start_replicas(2, *FLAGS, "--caller-quotas-file", str(quotas))
    )
    tally, places = LoadStats(), itertools.cycle((one, other))
    held, free = list(zip(names, places, strict=False)), [("free", one), ("free", other)] * 3
    async with _asking(held, "held", tally), _asking(free, "free", tally):
        await _calls_until(running, 22)
        calls = running.model_calls[2:]
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    events = _counts(calls, "held")
    assert _most_seconds_over(events, BURST_SECONDS) <= SEEN_LATE_SECONDS
    lasts = events[-1][0] - events[0][0]
    assert sum(count for _, count in events[1:]) >= 0.85 * QUOTA * lasts
    assert all(len(call.pairs) == BATCH for call in calls)


@pytest.mark.parametrize("redis_program", ["redis"], indirect=True)
async def test_a_quota_holds_while_redis_is_lost(running: Fleet, quotas: Path) -> None:
    """Each replica keeps to its part; going over, and coming back, cost no more than a burst each."""
    two = [proxy.target for proxy in running.start_replicas(2, *FLAGS, "--caller-quotas-file", str(quotas))]
    tally = LoadStats()
    async with _asking([("held", target) for target in two], "held", tally):
        await _calls_until(running, 4)
        await asyncio.to_thread(running.redis.kill)
        await _calls_until(running, len(running.model_calls) + 6)
        await asyncio.to_thread(running.redis.start)
        await _calls_until(running, len(running.model_calls) + 6)
        calls = running.model_calls
    assert (tally.wrong_pairs, tally.errors) == ([], [])
    assert _most_seconds_over(_counts(calls, "held"), 3 * BURST_SECONDS) <= SEEN_LATE_SECONDS


async def _calls_until(running: Fleet, count: int) -> None:
    await asyncio.to_thread(
        wait_for, lambda: len(running.model_calls) >= count, timeout_seconds=60, description="enough calls"
    )


@pytest.mark.parametrize("redis_program", ["valkey"], indirect=True)
def test_who_is_over_its_quota_is_told_so_and_when_to_come_back(running: Fleet, quotas: Path) -> None:
    """Refused at once, with the quota's name and a pushback, and counted; a changed file holds without a
    start, a broken one changes nothing.
    """  # noqa: D205 - one thought
    quotas.write_text('{"callers": {"held": {"pairs_per_second": 5, "queued_pairs": 100}}}')
    proxy = running.start_replica(*FLAGS, "--caller-quotas-file", str(quotas))
    who = [("x-caller", "held")]
    with open_caller(proxy.target) as one:
        many = one.infer(make_pairs("many", 101), metadata=who)
        late = one.infer(make_pairs("late", 50), metadata=who, timeout_seconds=5)
        for reply, quota in ((many, "queued_pairs"), (late, "pairs_per_second")):
            assert reply.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"quota {quota} of caller 'held'" in reply.message
            assert reply.pushback_ms
            assert read_metrics(proxy.http_url)["cache_proxy_quota_refused_total", "held", quota] == 1
        assert not running.model_calls
        for outcome, text in (("failed", "{"), ("done", "{}")):
            quotas.write_text(text)
            _wait_for_change(proxy, outcome)
            refused = one.infer(make_pairs(outcome, 101), metadata=who).code is not grpc.StatusCode.OK
            assert refused is (outcome == "failed")
    assert sum("going on with what was there before" in line for line in proxy.log_lines) == 1


def _wait_for_change(proxy: ServiceProcess, outcome: str) -> None:
    changes = ("cache_proxy_renewals_total", "caller_quotas", outcome)
    wait_for(
        lambda: read_metrics(proxy.http_url)[changes] == 1,
        timeout_seconds=30,
        description="the change is noticed",
    )
