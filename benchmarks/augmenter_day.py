"""Augment the files of a whole day: 1,440 files, 8M lines, 20M pairs cached in Redis.

The result has the time, and the processor time and memory of each process.
"""

import shutil
import time
from pathlib import Path

from benchmarks import postings
from benchmarks.augmenter_run import SCALE, metric_sums, proxy_and_model, run
from benchmarks.load import cpu_seconds, peak_bytes
from benchmarks.report import Figure, show
from benchmarks.store_server import fill_buckets, redis_process

_WORK = Path(".bench/day")
_FILES = int(1_440 * SCALE)
_LINES = int(8_000_000 * SCALE)
_NEW = int(55_000 * SCALE)
_KNOWN = int(postings.KNOWN * SCALE)
_MAX_SECONDS = 60 * SCALE
_FILL_BATCH_PAIRS = 1_000_000


def main() -> None:
    """Measure, print the table and write the JSON file."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    postings.generate(_WORK / "day", files=_FILES, lines=_LINES, new=_NEW, known=_KNOWN)
    with redis_process(_WORK / "redis") as redis:
        for first in range(0, _KNOWN, _FILL_BATCH_PAIRS):
            fill_buckets(redis, range(first, min(first + _FILL_BATCH_PAIRS, _KNOWN)))
        with proxy_and_model(_WORK, cache_url=redis.url) as (proxy, stub):
            pids = {
                "proxy": proxy.pid,
                "Redis": int(redis.client.info("server")["process_id"]),
                "stub": stub.pid,
            }
            before = {name: cpu_seconds(pid) for name, pid in pids.items()}
            began = time.perf_counter()
            ran = run(str(_WORK / "day"), str(_WORK / "out"), "--target", proxy.target)
            seconds = time.perf_counter() - began
            spent = {
                name: (cpu_seconds(pid) - before[name], peak_bytes(pid) / 2**20) for name, pid in pids.items()
            }
            store = metric_sums(proxy.http, "cache_proxy_store_duration_seconds_sum", label="op")
    spent = {"augmenter": (ran.cpu_seconds, ran.peak_mib)} | spent
    pairs = ran.summary["pairs"]
    beside = f"{seconds:.0f} s"
    figures = [
        Figure(
            what=f"a day: {_FILES:,} files, {_LINES:,} lines, {_NEW:,} new pairs",
            measured=beside,
            beside=f"{_MAX_SECONDS:.0f} s",
            ratio=seconds / _MAX_SECONDS,
            target=1,
            at_most=True,
            note=f"{_KNOWN:,} known; {pairs['asked']:,} pairs asked, {pairs['misses']:,} missed",
        )
    ]
    for what, op in (("reads", "get"), ("writes", "put")):
        waited = store.get(op, 0)
        figures.append(
            Figure(
                what=f"in cache {what}",
                measured=f"{waited:.1f} s",
                beside=beside,
                ratio=waited / seconds,
                target=1,
                at_most=True,
                note="waited for by the proxy, summed over calls that overlap",
            )
        )
    for name, (cpu, mib) in spent.items():
        figures.append(
            Figure(
                what=f"processor time, {name}",
                measured=f"{cpu:.1f} s",
                beside=beside,
                ratio=cpu / seconds,
                target=1.1,
                at_most=True,
                note=f"{mib:,.0f} MiB at most",
            )
        )
    show("augmenter_day", figures)


if __name__ == "__main__":
    main()
