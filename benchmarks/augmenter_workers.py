"""Process files with 1, 2 and 4 workers on one queue: they share the files, and none is processed twice."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import boto3

from benchmarks import postings
from benchmarks.augmenter_run import SCALE, AugmenterProcess, proxy_and_model
from benchmarks.report import Figure, show
from tests.support.s3_server import S3Server, s3_server
from tests.support.sqs_server import SqsServer, object_created_event, sqs_server

_WORK = Path(".bench/workers")
_FILES = max(4, int(240 * SCALE))
_LINES = int(240 * 5_600 * SCALE)
_WORKERS = (1, 2, 4)
_BUCKET = "bench"


def main() -> None:
    """Measure, print the table and write the JSON file."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    postings.generate(_WORK / "day", files=_FILES, lines=_LINES)
    work = _WORK.resolve()
    with s3_server(work) as s3, sqs_server(work, s3.environment) as sqs, proxy_and_model(work) as (proxy, _):
        os.environ.update(s3.environment | {"AWS_ENDPOINT_URL_SQS": sqs.endpoint_url})
        keys = _fill(s3)
        _measure_workers(s3, sqs, proxy.target, keys, workers=2)
        # The first run only fills the cache of the proxy.
        figures = [_measure_workers(s3, sqs, proxy.target, keys, workers=workers) for workers in _WORKERS]
    show("augmenter_workers", figures)


def _measure_workers(s3: S3Server, sqs: SqsServer, target: str, keys: list[str], *, workers: int) -> Figure:
    name = f"round-{time.monotonic_ns()}"
    queue = sqs.create_queue(name)
    for key in keys:
        queue.send(object_created_event(_BUCKET, key))
    began = time.perf_counter()
    running = [
        AugmenterProcess(
            f"s3://{_BUCKET}/raw/",
            f"s3://{_BUCKET}/{name}/",
            "--endpoint-url",
            s3.endpoint_url,
            "--sqs-queue-url",
            queue.url,
            "--target",
            target,
        )
        for _ in range(workers)
    ]
    summaries = [one.wait().summary for one in running]
    seconds = time.perf_counter() - began
    done = [one["files"]["done"] for one in summaries]
    lines = sum(one["lines"]["augmented"] for one in summaries)
    return Figure(
        what=f"{workers} workers, {len(keys)} files: files done",
        measured=f"{sum(done)}",
        beside=f"{len(keys)}",
        ratio=sum(done) / len(keys),
        target=1,
        note=f"{' + '.join(map(str, done))}; {lines:,} of {_LINES:,} lines, {queue.count()} messages left, "
        f"{sum(one['files']['skipped'] for one in summaries)} twice; {seconds:.1f} s, start and end included",
    )


def _fill(s3: S3Server) -> list[str]:
    client: Any = boto3.client(  # type: ignore[no-untyped-call]
        "s3", endpoint_url=s3.endpoint_url, region_name=s3.environment["AWS_DEFAULT_REGION"]
    )
    client.create_bucket(Bucket=_BUCKET)
    keys = []
    for path in sorted((_WORK / "day").iterdir()):
        keys.append(f"raw/{path.name}")
        client.put_object(Bucket=_BUCKET, Key=keys[-1], Body=path.read_bytes())
    return keys


if __name__ == "__main__":
    main()
