"""Memory of a pair in Redis, and throughput of a proxy without L1, with few and with many stored pairs."""

import random
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median

from benchmarks import load
from benchmarks.report import Figure, show
from benchmarks.store_server import RedisProcess, fill_buckets, fill_strings, pair, redis_process
from demo.processes import Server, running_server

_WORK = Path(".bench/store")
_SMALL = 100_000
_MIDDLE = 1_000_000
_LARGE = 20_000_000
_BATCH = 1000
_TASKS = 4
_ROUNDS = 5
_SECONDS = 3.0
_MAX_MS = 5


def main() -> None:
    """Measure, print the table and write the JSON file."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    figures: list[Figure] = []
    with ExitStack() as stack:
        small, large = (stack.enter_context(redis_process(_WORK / name)) for name in ("small", "large"))
        empty = large.used_bytes
        filled = 0
        for count in (_MIDDLE, _LARGE):
            fill_buckets(large, range(filled, count))
            filled = count
            figures += _compare_bytes(count, (large.used_bytes - empty) / count)
        figures.append(_script_duration(large))
        fill_buckets(small, range(_SMALL))
        fill_strings(small, range(_SMALL))
        floor = stack.enter_context(_python("benchmarks.floor"))
        mget = stack.enter_context(_python("benchmarks.store_mget", small.url))
        proxy = stack.enter_context(_proxy(floor, small))
        at_large = stack.enter_context(_proxy(floor, large))
        known, of_many = _batches(_SMALL), _batches(_LARGE)
        runs = _alternating(
            {"floor": (floor, known), "MGET": (mget, known), "L2": (proxy, known), "20M": (at_large, of_many)}
        )
        figures += [
            _ratio("L2 hits, batch of 1000, L1 off", runs, "L2", "floor", target=0.4),
            _ratio("L2 hits, batch of 1000, L1 off", runs, "L2", "MGET", target=1.5),
            _ratio("the same at 20M pairs", runs, "20M", "L2", target=0.9),
        ]
    show("store_pairs", figures)


def _compare_bytes(count: int, each: float) -> list[Figure]:
    """Compare with one string key with a TTL for each pair, in a separate server."""
    with redis_process(_WORK / "strings") as strings:
        empty = strings.used_bytes
        fill_strings(strings, range(count))
        beside = (strings.used_bytes - empty) / count
    what = f"bytes a pair, {count:,} pairs, with age"
    return [
        Figure(what=what, measured=f"{each:.1f}", beside="20", ratio=each / 20, target=1, at_most=True),
        Figure(
            what=what,
            measured=f"{each:.1f}",
            beside=f"string key with a TTL: {beside:.1f}",
            ratio=beside / each,
            target=5,
        ),
    ]


def _script_duration(filled: RedisProcess) -> Figure:
    """Measure how long a script blocked Redis while the cache grew, on a machine that is busy with both."""
    slow = sorted(entry["duration"] / 1000 for entry in filled.client.slowlog_get(1000))
    stats = filled.client.info("commandstats")["cmdstat_evalsha"]
    mean_ms = stats["usec_per_call"] / 1000
    return Figure(
        what="a script's hold on Redis",
        measured=f"{mean_ms:.2f} ms on average",
        beside=f"{_MAX_MS} ms",
        ratio=mean_ms / _MAX_MS,
        target=1,
        at_most=True,
        note=f"{len(slow)} of {stats['calls']:,} took longer, the longest {slow[-1] if slow else 0:.1f} ms",
    )


def _alternating(servers: dict[str, tuple[Server, Sequence[bytes]]]) -> dict[str, list[load.LoadRun]]:
    """Run all servers alternately, so that all see the same load of the machine."""
    runs: dict[str, list[load.LoadRun]] = {name: [] for name in servers}
    for one, messages in servers.values():
        load.send_all(one.target, messages, tasks=_TASKS)
    for _ in range(_ROUNDS):
        for name, (one, messages) in servers.items():
            runs[name].append(load.measure(one.target, messages, pid=one.pid, tasks=_TASKS, seconds=_SECONDS))
    return runs


def _ratio(
    what: str, runs: dict[str, list[load.LoadRun]], mine: str, theirs: str, *, target: float
) -> Figure:
    ratios = [one.rate / other.rate for one, other in zip(runs[mine], runs[theirs], strict=True)]
    cpu = [other.server_us / one.server_us for one, other in zip(runs[mine], runs[theirs], strict=True)]
    return Figure(
        what=what,
        measured=_format_runs(runs[mine]),
        beside=f"{theirs}: {_format_runs(runs[theirs])}",
        ratio=median(ratios),
        target=target,
        note=f"by processor time of the proxy {median(cpu):.2f}",
    )


def _format_runs(runs: Sequence[load.LoadRun]) -> str:
    pairs = median(run.rate for run in runs) * _BATCH
    return f"{pairs:,.0f} pairs/s, {median(run.server_us for run in runs) / _BATCH:.2f} µs a pair"


def _batches(known: int) -> list[bytes]:
    """Return requests for pairs drawn uniformly, which is the worst case for every cache."""
    drawn = random.Random(1)
    return [load.message(pair(rank) for rank in drawn.sample(range(known), _BATCH)) for _ in range(200)]


def _python(module: str, *args: str) -> AbstractContextManager[Server]:
    return running_server(module, list(args), log=_WORK / f"{module}.log")


def _proxy(model: Server, store: RedisProcess) -> AbstractContextManager[Server]:
    args = ["serve", "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--drain-delay", "0s"]
    args += ["--model-target", model.target, "--cache-url", store.url, "--l1-max-bytes", "0"]
    return running_server("services.cache_proxy", args, log=_WORK / "proxy.log")


if __name__ == "__main__":
    main()
