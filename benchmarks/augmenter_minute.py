"""Time to augment the file of one minute with its new pairs, beside the time of the model alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import boto3
from botocore.exceptions import ClientError

from benchmarks import postings
from benchmarks.augmenter_run import metric_sums, proxy_and_model, run
from benchmarks.report import Figure, show
from demo.processes import environment
from tests.support.s3_server import S3Server, s3_server

_WORK = Path(".bench/minute")
_LINES = 5_600
_NEW = 40
_ROUNDS = 7
_MODEL_SECONDS = 0.2
_MAX_SECONDS = 0.150
# After a pause longer than the interval of the model's calls, the next call may start at once.
_IDLE_SECONDS = 2.5
_BUCKET = "bench"


def main() -> None:
    """Measure, print the table and write the JSON file."""
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    latency = f"{_MODEL_SECONDS * 1000:.0f}ms"
    with (
        s3_server(_WORK.resolve()) as s3,
        proxy_and_model(_WORK, latency=latency, limited=True) as (proxy, _),
    ):
        os.environ.update(s3.environment)
        # Both files draw the same known pairs.
        postings.generate(_WORK / "known", files=1, lines=_LINES - _NEW)
        run(str(_WORK / "known"), str(_WORK / "out"), "--target", proxy.target)
        client = _client(s3)
        client.create_bucket(Bucket=_BUCKET)
        with _running_watcher(s3, proxy.target) as http:
            took = [_measure_file(client, http, number) for number in range(_ROUNDS)]
    calls = [call for call in _calls() if len(call["pairs"]) == _NEW]
    above = median(took) - _MODEL_SECONDS
    each = len(calls) / _ROUNDS
    shown = f"{above * 1000:.0f} ms"
    show(
        "augmenter_minute",
        [
            Figure(
                what=f"a minute's file, {_LINES} lines, {_NEW} new pairs, above the model's time",
                measured=shown,
                beside=f"{_MAX_SECONDS * 1000:.0f} ms",
                ratio=above / _MAX_SECONDS,
                target=1,
                at_most=True,
                note=f"the model's time: {latency}; the worst with it: {max(took) * 1000:.0f} ms",
            ),
            Figure(
                what="calls to the model for it",
                measured=f"{each:.1f}",
                beside="1",
                ratio=each,
                target=1,
                at_most=True,
            ),
        ],
    )


@contextmanager
def _running_watcher(s3: S3Server, target: str) -> Iterator[str]:
    """Run the augmenter with --watch. Yield the address of its metrics."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "services.augmenter",
            "run",
            f"s3://{_BUCKET}/raw/",
            f"s3://{_BUCKET}/mod/",
            "--watch",
            "--poll-interval",
            "100ms",
            "--http-listen",
            "127.0.0.1:0",
            "--target",
            target,
            "--endpoint-url",
            s3.endpoint_url,
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stderr  # noqa: S101 - a pipe
    try:
        yield process.stderr.readline().split("http://")[1].split("/")[0]
    finally:
        process.terminate()
        process.communicate()


def _measure_file(client: Any, http: str, number: int) -> float:
    """Put a new file and return the seconds that the augmenter's metrics report for it."""
    folder = _WORK / f"minute-{number}"
    postings.generate(folder, files=1, lines=_LINES, new=_NEW, first_new=postings.KNOWN + number * _NEW)
    name = f"{1_714_521_600 + 60 * number}.jsonl"
    time.sleep(_IDLE_SECONDS)
    before = _file_seconds(http)
    client.put_object(Bucket=_BUCKET, Key=f"raw/{name}", Body=next(folder.iterdir()).read_bytes())
    give_up_at = time.monotonic() + 30
    while time.monotonic() < give_up_at:
        try:
            client.head_object(Bucket=_BUCKET, Key=f"mod/{name}")
        except ClientError:
            time.sleep(0.05)
        else:
            break
    while (now := _file_seconds(http)) == before and time.monotonic() < give_up_at:
        time.sleep(0.05)
    return now - before


def _file_seconds(http: str) -> float:
    return metric_sums(http, "augmenter_file_duration_seconds_sum", label="")[""]


def _client(s3: S3Server) -> Any:
    made: Any = boto3.client(  # type: ignore[no-untyped-call]
        "s3", endpoint_url=s3.endpoint_url, region_name=s3.environment["AWS_DEFAULT_REGION"]
    )
    return made


def _calls() -> list[dict[str, list[str]]]:
    return [json.loads(line) for line in (_WORK / "calls.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
