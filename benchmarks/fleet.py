"""What a fleet of replicas over one Redis costs the model, counted in the call log of the model stub.

The baseline beside each result is the theoretical optimum, or what the rate limit allows.
"""

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import Figure, show
from tests.fleet.scenarios import (
    measure_lone_misses,
    measure_queue_positions,
    send_same_pairs,
    send_same_pairs_at_once,
    send_single_pair_backlog,
)
from tests.support.call_log import inferences_per_pair
from tests.support.caller import make_pairs
from tests.support.fleet import Fleet, fleet
from tests.support.redis_server import PROGRAMS

_STUB_SECONDS = 0.2
_LINGER_SECONDS = 0.02
_BACKLOG_SECONDS = 60
_BACKLOG_BATCH = 300


@contextmanager
def _running(program: str) -> Iterator[Fleet]:
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet(Path(folder), "--latency", f"{_STUB_SECONDS * 1000:.0f}ms", program=program) as running,
    ):
        yield running


def _same_pairs(program: str, *, closed: bool) -> list[Figure]:
    loop = "closed" if closed else "open"
    with _running(program) as running:
        targets = [proxy.target for proxy in running.start_replicas(3)]
        asyncio.run(send_same_pairs(targets, closed_loop=closed))
        calls = running.model_calls
        asyncio.run(send_same_pairs(targets, closed_loop=closed))
        again = len(running.model_calls) - len(calls)
    what = f"3 replicas, 6 callers, same 5,000 pairs, {loop} loop"
    return [
        Figure(
            what=f"{what}: inferences a pair",
            measured=f"{sum(len(call.pairs) for call in calls)}",
            beside="5000",
            ratio=inferences_per_pair(calls),
            target=1.0,
            at_most=True,
        ),
        Figure(
            what=f"{what}: calls",
            measured=f"{len(calls)}",
            beside="5",
            ratio=len(calls) / 5,
            target=(9 if closed else 7) / 5,
            at_most=True,
            note=f"second round: {again} calls",
        ),
    ]


def _same_keys_at_once(program: str) -> list[Figure]:
    with _running(program) as running:
        targets = [proxy.target for proxy in running.start_replicas(4)]
        pairs = make_pairs("herd", 1000)
        _, commands = asyncio.run(send_same_pairs_at_once(running, targets, pairs))
        calls = [call for call in running.model_calls if set(pairs).intersection(call.pairs)]
    return [
        Figure(
            what="4 processes, same 1000 keys at once: calls",
            measured=f"{len(calls)}",
            beside="1",
            ratio=len(calls),
            target=1,
            at_most=True,
            note="dogpile.cache: 4",
        ),
        Figure(
            what="the same: commands to Redis",
            measured=f"{len(commands)}",
            beside="50",
            ratio=len(commands) / 50,
            target=1,
            at_most=True,
            note="dogpile.cache: 20,097",
        ),
    ]


def _backlog(program: str) -> list[Figure]:
    with _running(program) as running:
        paced = asyncio.run(
            send_single_pair_backlog(running, seconds=_BACKLOG_SECONDS, batch_pairs=_BACKLOG_BATCH)
        )
    what = f"4 replicas, {_BACKLOG_SECONDS} s of single pairs, kill -9, start, SIGSTOP"
    return [
        Figure(
            what=f"{what}: batch fill",
            measured=f"{paced.fill_ratio:.1%}",
            beside="100 %",
            ratio=paced.fill_ratio,
            target=0.95,
            note=f"{paced.calls} calls",
        ),
        Figure(
            what="the same: rate used",
            measured=f"{paced.rate_utilization:.1%}",
            beside="100 %",
            ratio=paced.rate_utilization,
            target=0.97,
        ),
        Figure(
            what="the same: a window is too short by",
            measured=f"{paced.max_limit_excess_seconds * 1000:.0f} ms",
            beside="0 ms",
            ratio=paced.max_limit_excess_seconds,
            target=0,
            at_most=True,
            note=f"{paced.duplicate_inferences} pairs twice, of {_BACKLOG_BATCH} a killed or paused call had",
        ),
    ]


def _small_requests(program: str) -> list[Figure]:
    with _running(program) as running:
        quick, small = asyncio.run(measure_queue_positions(running, pairs=100_000, rounds=5))
    return [
        Figure(
            what="interactive pair behind 100,000 bulk pairs: calls before its own",
            measured=f"{quick}",
            beside="0",
            ratio=quick,
            target=1,
            at_most=True,
            note="1: the next was on its way already",
        ),
        Figure(
            what="small bulk caller behind them: calls before its last",
            measured=f"{small}",
            beside="1",
            ratio=small,
            target=2,
            at_most=True,
        ),
    ]


def _single_misses(program: str) -> list[Figure]:
    with _running(program) as running:
        proxy = running.start_replica("--model-calls-per-second", "0", "--model-rate", "1000000")
        through, direct = asyncio.run(measure_lone_misses(running, proxy.target, count=100))
    floor = _LINGER_SECONDS + direct
    return [
        Figure(
            what="uncontended miss, p50, above linger and model",
            measured=f"{through * 1000:.1f} ms",
            beside=f"{floor * 1000:.1f} ms",
            ratio=(through - floor) * 1000,
            target=5,
            at_most=True,
            note="ratio: the difference in ms; the model asked directly by turns",
        ),
    ]


_SCENARIOS: tuple[Callable[[str], list[Figure]], ...] = (
    lambda program: _same_pairs(program, closed=False),
    lambda program: _same_pairs(program, closed=True),
    _same_keys_at_once,
    _backlog,
    _small_requests,
    _single_misses,
)


def main() -> None:
    """Run every scenario on each kind of Redis server that is installed."""
    for name, program in PROGRAMS.items():
        if program is not None:
            show(f"fleet-{name}", [figure for scenario in _SCENARIOS for figure in scenario(program)])


if __name__ == "__main__":
    main()
