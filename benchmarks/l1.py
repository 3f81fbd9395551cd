"""Throughput of L1 hits beside a server without lookups, and the memory of a million entries.

Pairs are drawn as on a usual day: by rank, with Zipf exponent 1.1.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import median
from urllib.request import urlopen

from benchmarks import load
from benchmarks.report import Figure, show
from demo.processes import Server, running_server

_WORK = Path(".bench/l1")
_KNOWN_PAIRS = 100_000
_MEMORY_PAIRS = 1_000_000
_L1_BYTES = 256 * 2**20
_ALLOWED_BYTES = 100 * 2**20
_BATCH = 1000
_ROUNDS = 11
_SECONDS = 1.5
_PACE = ("--model-calls-per-second", "0", "--model-rate", "20000", "--linger", "1ms")


def main() -> None:
    """Measure, print the table and write the JSON file."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    with _floor() as floor:
        with _proxy(floor, "memory:") as proxy:
            load.send_all(proxy.target, _messages(range(_KNOWN_PAIRS)), tasks=4)
            batches = [load.message(_draw_pairs(_BATCH, seed=seed)) for seed in range(200)]
            singles = [load.message([pair]) for pair in _draw_pairs(20_000, seed=1)]
            load.send_all(proxy.target, batches, tasks=4)
            figures = [
                _compare("batch of 1000, pairs/s", floor, proxy, batches, tasks=8, pairs=_BATCH, target=1.3),
                _compare("one pair an RPC, RPCs/s", floor, proxy, singles, tasks=16, pairs=1, target=0.9),
            ]
        figures.append(_memory(floor))
    show("l1", figures)


def _compare(
    what: str,
    floor: Server,
    proxy: Server,
    messages: Sequence[bytes],
    *,
    tasks: int,
    pairs: int,
    target: float,
) -> Figure:
    """Run both servers alternately and compare the medians, so that both see the same load of the machine."""
    runs = {"floor": list[load.LoadRun](), "proxy": list[load.LoadRun]()}
    for _ in range(_ROUNDS):
        for name, measured in (("floor", floor), ("proxy", proxy)):
            run = load.measure(measured.target, messages, pid=measured.pid, tasks=tasks, seconds=_SECONDS)
            runs[name].append(run)
    shown = {
        name: f"{median(run.rate for run in some) * pairs:,.0f}"
        f" ({median(run.server_us for run in some):,.0f} µs of processor an RPC)"
        for name, some in runs.items()
    }
    ratios = [mine.rate / theirs.rate for mine, theirs in zip(runs["proxy"], runs["floor"], strict=True)]
    cpu = [
        theirs.server_us / mine.server_us for mine, theirs in zip(runs["proxy"], runs["floor"], strict=True)
    ]
    return Figure(
        what=what,
        measured=shown["proxy"],
        beside=f"floor: {shown['floor']}",
        ratio=median(ratios),
        target=target,
        note=f"by processor time {median(cpu):.2f}",
    )


def _memory(model: Server) -> Figure:
    """Measure a proxy that reads a million pairs from its store, so that its queue has never held them."""
    store = f"embedded:{_WORK / 'cache'}"
    with _proxy(model, store) as filling:
        load.send_all(filling.target, _messages(range(_MEMORY_PAIRS)), tasks=4)
    with _proxy(model, store, "--l1-max-bytes", str(_L1_BYTES)) as proxy:
        # Pairs that were requested twice are in the protected half of L1.
        half = range(_MEMORY_PAIRS // 2)
        for pairs in (half, half, range(half.stop, _MEMORY_PAIRS)):
            load.send_all(proxy.target, _messages(pairs), tasks=4)
        entries, peak = _metric(proxy, "cache_proxy_l1_entries"), load.peak_bytes(proxy.pid)
    return Figure(
        what="memory with 1M pairs in L1",
        measured=f"{_mib(peak)}, {entries:,.0f} pairs",
        beside=f"--l1-max-bytes {_mib(_L1_BYTES)}, and {_mib(_ALLOWED_BYTES)}",
        ratio=peak / (_L1_BYTES + _ALLOWED_BYTES),
        target=1,
        at_most=True,
    )


def _floor() -> AbstractContextManager[Server]:
    return running_server("benchmarks.floor", [], log=_WORK / "floor.log")


def _proxy(model: Server, cache_url: str, *flags: str) -> AbstractContextManager[Server]:
    args = ["serve", "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0", "--drain-delay", "0s"]
    args += ["--model-target", model.target, "--cache-url", cache_url, *_PACE, *flags]
    return running_server("services.cache_proxy", args, log=_WORK / "proxy.log")


def _pair(rank: int) -> tuple[str, str]:
    return f"Company {rank:07}", f"Senior Title {rank % 997}"


def _messages(ranks: range) -> Iterator[bytes]:
    for start in range(0, len(ranks), _BATCH):
        yield load.message(_pair(rank) for rank in ranks[start : start + _BATCH])


def _draw_pairs(count: int, *, seed: int) -> list[tuple[str, str]]:
    ranks = random.Random(seed).choices(range(_KNOWN_PAIRS), cum_weights=_weights(), k=count)
    return [_pair(rank) for rank in ranks]


@cache
def _weights() -> list[float]:
    return list(accumulate(1 / rank**1.1 for rank in range(1, _KNOWN_PAIRS + 1)))


def _metric(proxy: Server, name: str) -> float:
    with urlopen(f"http://{proxy.http}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
