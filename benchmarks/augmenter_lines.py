"""Lines per second and processor time per line, local and S3 to S3, beside the minimal work for them."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import uvloop

from benchmarks import postings
from benchmarks.augmenter_run import SCALE, RunResult, proxy_and_model, run, start_cpu_seconds
from benchmarks.report import Figure, show
from services.common.aws_client import open_client
from services.common.storage.s3 import S3Store
from tests.support.s3_server import S3Server, s3_server

_WORK = Path(".bench/augmenter")
_LINES = int(1_000_000 * SCALE)
_FILES = 8
_SMALL_FILES = 1000
_ROUNDS = 3
_CONCURRENCY = 4
_BUCKET = "bench"
_MAX_MIB = 300


def main() -> None:
    """Measure, print the table and write the JSON file."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    postings.generate(_WORK / "one", files=1, lines=_LINES)
    postings.generate(_WORK / "eight", files=_FILES, lines=_LINES)
    postings.generate(_WORK / "small", files=_SMALL_FILES, lines=_LINES)
    with proxy_and_model(_WORK) as (proxy, _):
        figures = [*_local(proxy.target), *_small(proxy.target)]
        with s3_server(_WORK.resolve()) as s3:
            os.environ.update(s3.environment)
            figures += _s3(s3, proxy.target)
    show("augmenter_lines", figures)


def _local(target: str) -> list[Figure]:
    args = (str(_WORK / "one"), str(_WORK / "out"), "--overwrite", "--target", target)
    start = start_cpu_seconds(_WORK)
    # The first run fills the cache of the proxy.
    run(*args)
    loops, runs = [], []
    for _ in range(_ROUNDS):
        loops.append(_loop(next((_WORK / "one").iterdir())))
        runs.append(run(*args))
    rate, floor = _LINES / median(one.seconds for one in runs), _LINES / median(loops)
    cpu = median((one.cpu_seconds - start) / _LINES * 1e6 for one in runs)
    requested = runs[-1].summary["pairs"]["asked"] / _LINES
    return [
        Figure(
            what="lines/s, local, one process",
            measured=f"{rate:,.0f}",
            beside=f"json.loads and json.dumps: {floor:,.0f}",
            ratio=rate / floor,
            target=4,
            note=f"{requested:.2f} pairs asked a line",
        ),
        Figure(
            what="processor time a line, without the start",
            measured=f"{cpu:.2f} µs",
            beside="1.5 µs",
            ratio=cpu / 1.5,
            target=1,
            at_most=True,
            note=f"{cpu * floor / 1e6:.2f} of the loop's; the start: {start:.2f} s",
        ),
        _memory("one file", runs),
    ]


def _small(target: str) -> list[Figure]:
    ran = run(str(_WORK / "small"), str(_WORK / "out"), "--overwrite", "--target", target)
    return [_memory(f"{_SMALL_FILES} files", [ran])]


def _memory(what: str, runs: list[RunResult]) -> Figure:
    peak = max(one.peak_mib for one in runs)
    return Figure(
        what=f"most memory, {what}",
        measured=f"{peak:.0f} MiB",
        beside=f"{_MAX_MIB} MiB",
        ratio=peak / _MAX_MIB,
        target=1,
        at_most=True,
    )


_LOOP = """
import json, sys, time
began = time.perf_counter()
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as sink:
    for line in source:
        posting = json.loads(line)
        posting["seniority"] = 4
        sink.write(json.dumps(posting).encode() + b"\\n")
print(time.perf_counter() - began)
"""


def _loop(path: Path) -> float:
    """Return the seconds of a loop that parses and writes without lookups, in a separate process too."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOP, str(path), str(_WORK / "loop.jsonl")],
        check=True,
        stdout=subprocess.PIPE,
    )
    seconds: float = json.loads(done.stdout)
    return seconds


def _s3(s3: S3Server, target: str) -> list[Figure]:
    source, sink = f"s3://{_BUCKET}/raw/", f"s3://{_BUCKET}/mod/"
    args = (source, sink, "--overwrite", "--target", target, "--endpoint-url", s3.endpoint_url)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_fill(s3))
    run(*args)
    copies, runs = [], []
    for _ in range(_ROUNDS):
        copies.append(_copy(s3))
        runs.append(run(*args))
    rate, floor = _LINES / median(one.seconds for one in runs), _LINES / median(copies)
    return [
        Figure(
            what="lines/s, S3 to S3",
            measured=f"{rate:,.0f}",
            beside=f"copied unchanged: {floor:,.0f}",
            ratio=rate / floor,
            target=0.5,
            note="all of it on these cores, the S3 server too",
        ),
        _memory("S3 to S3", runs),
    ]


async def _fill(s3: S3Server) -> None:
    async with open_client("s3", endpoint_url=s3.endpoint_url, max_connections=2) as client:
        await client.create_bucket(Bucket=_BUCKET)
        for path in sorted((_WORK / "eight").iterdir()):
            await client.put_object(Bucket=_BUCKET, Key=f"raw/{path.name}", Body=path.read_bytes())


def _copy(s3: S3Server) -> float:
    """Return the seconds of a copy with the same client, part size and concurrency, in a separate process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.augmenter_lines", s3.endpoint_url],
        check=True,
        stdout=subprocess.PIPE,
    )
    seconds: float = json.loads(done.stdout)
    return seconds


async def _copy_all(endpoint_url: str) -> float:
    async with open_client("s3", endpoint_url=endpoint_url, max_connections=4 * _CONCURRENCY) as client:
        source = S3Store(client, bucket=_BUCKET, prefix="raw/")
        sink = S3Store(client, bucket=_BUCKET, prefix="copy/")
        places = asyncio.Semaphore(_CONCURRENCY)
        began = time.perf_counter()
        items = [item async for item in source.list()]

        async def copy(place: int) -> None:
            async with places, sink.create(items[place].name, items[place]) as upload:
                async for data in source.read(items[place]):
                    await upload.write(data)
                await upload.complete()

        await asyncio.gather(*map(copy, range(len(items))))
        return time.perf_counter() - began


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as _runner:
            sys.stdout.write(json.dumps(_runner.run(_copy_all(sys.argv[1]))))
    else:
        main()
