"""Tests of unplanned ends: signals, kill -9 and inputs that change never leave a partial output."""

import asyncio
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from services.common.line_reader import MAX_LINE_BYTES
from tests.integration.augmenter.conftest import StartStub
from tests.support.augmenter_process import augmenter_process
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_model
from tests.support.postings import make_posting
from tests.support.processes import ROOT, clean_environment
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket

pytestmark = pytest.mark.alone
_FIRST_CHUNK_LINES = 20_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Create a folder with one file of several chunks."""
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "a.jsonl").open("wb") as file:
        for i in range(60_000):
            file.write(make_posting(f"C{i}", id=i) + b"\n")
    return folder


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def _wait_for_bytes(sink: Path) -> None:
    """Wait until the run is in the middle of the file: its temporary file is not empty."""
    wait_for(lambda: any(path.stat().st_size for path in sink.glob(".*")), description="something is written")


@dataclass(frozen=True)
class SlowModel:
    """A model that answers a file's first chunk, and the rest once `go` is set."""

    target: str
    go: threading.Event


@pytest.fixture
def slow_model() -> Iterator[SlowModel]:
    """Start a model that is released at the latest when the test ends."""
    go = threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        if any(int(company[1:]) >= _FIRST_CHUNK_LINES for company, _ in call.pairs):
            go.wait(60)
        return answer_all(call)

    with scripted_model(behave) as model:
        yield SlowModel(model.target, go)
        go.set()


@pytest.mark.slow
def test_kill_leaves_no_partial_output_and_next_run_cleans_up(
    source: Path, tmp_path: Path, slow_model: SlowModel
) -> None:
    """A run killed by SIGKILL leaves at most a hidden temporary file, which the next run removes."""
    sink = tmp_path / "out"
    with augmenter_process(source, sink, "--target", slow_model.target) as process:
        _wait_for_bytes(sink)
        process.kill()
        process.wait()
    assert [name[0] for name in _files(sink)] == ["."]
    slow_model.go.set()
    with augmenter_process(source, sink, "--target", slow_model.target) as again:
        assert again.wait(60) == 0
    assert _files(sink) == ["a.jsonl"]
    assert (sink / "a.jsonl").read_bytes().count(b"\n") == 60_000


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGTERM, 143, "augmenter: stopped by SIGTERM"), (signal.SIGINT, 130, "augmenter: interrupted")],
)
def test_signal_ends_the_run_without_output(
    source: Path, tmp_path: Path, slow_model: SlowModel, number: signal.Signals, code: int, message: str
) -> None:
    """SIGTERM and SIGINT end the run with one line and their exit code, and leave no file."""
    sink = tmp_path / "out"
    with augmenter_process(source, sink, "--target", slow_model.target) as process:
        _wait_for_bytes(sink)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert (out, err.strip().count("\n")) == ("", 0)
    assert err.strip().startswith(message)
    assert _files(sink) == []


async def test_metrics_are_served_during_the_run(source: Path, tmp_path: Path, slow_model: SlowModel) -> None:
    """The HTTP endpoint serves every metric of the augmenter during the run."""
    args = (source, tmp_path / "out", "--target", slow_model.target, "--http-listen", "127.0.0.1:0")
    with augmenter_process(*args) as process:
        assert process.stderr
        line = await asyncio.to_thread(process.stderr.readline)
        url = line.split()[-1]
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            text = await answer.text()
        async with (
            aiohttp.ClientSession() as session,
            session.get(url.replace("metrics", "healthz")) as answer,
        ):
            assert answer.status == 200
    for name in (
        'augmenter_files_total{outcome="done"} 0.0',
        'augmenter_lines_total{outcome="augmented"} 0.0',
        "augmenter_file_duration_seconds_count",
        "augmenter_rpc_duration_seconds_count",
        "augmenter_backlog_files",
        'augmenter_build_info{version="',
    ):
        assert name in text


_PEAK_MEMORY_PROGRAM = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "services.augmenter", "run", *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def _peak_mib(*args: object, env: dict[str, str] | None = None) -> int:
    """Return the peak memory of a run in MiB.

    A small process starts the run, since a child begins with the memory of its parent.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PEAK_MEMORY_PROGRAM, *map(str, args)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)} | (env or {}),
    )
    return int(done.stdout.splitlines()[-1]) // 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(stub_with: StartStub, tmp_path: Path) -> None:
    """A compressed file of 400 MB of text is augmented within 200 MiB."""
    block = b"".join(make_posting(f"C{i % 500}", id=i, text="x" * 120) + b"\n" for i in range(20_000))
    with gzip.open(tmp_path / "many.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(110):
            file.write(block)
    assert _peak_mib(tmp_path / "many.jsonl.gz", f"{tmp_path}/out/", "--target", stub_with().target) < 200


_MANY_LINES = 550_000


@pytest.mark.slow
def test_memory_is_bounded_while_the_target_is_slow(tmp_path: Path) -> None:
    """A file of 300 MB is augmented within 300 MiB of memory, even if the target is slower than reading."""
    with (tmp_path / "many.jsonl").open("wb") as file:
        for i in range(_MANY_LINES // 100):
            file.write((make_posting(f"C{i}", text="x" * 500) + b"\n") * 100)

    def behave(call: ReceivedCall) -> Answers:
        time.sleep(1)
        return answer_all(call)

    with scripted_model(behave) as model:
        peak = _peak_mib(tmp_path / "many.jsonl", f"{tmp_path}/out/", "--target", model.target)
    assert peak < 300
    with (tmp_path / "out" / "many.jsonl").open("rb") as output:
        assert sum(1 for _ in output) == _MANY_LINES


@pytest.mark.slow
def test_memory_is_bounded_for_short_lines_while_the_target_is_slow(tmp_path: Path) -> None:
    """A million distinct lines of 30 bytes are augmented by a slow model within 300 MiB of memory."""
    with (tmp_path / "many.jsonl").open("wb") as file:
        for i in range(1_000_000):
            file.write(b'{"company":"%x","title":"b"}\n' % i)
    started: list[float] = []

    def behave(call: ReceivedCall) -> Answers:
        started.append(call.monotonic_seconds)
        time.sleep(max(0.0, started[0] + 15 - time.monotonic()))
        return answer_all(call)

    with scripted_model(behave) as model:
        peak = _peak_mib(tmp_path / "many.jsonl", f"{tmp_path}/out/", "--target", model.target)
    assert peak < 300


@pytest.mark.slow
def test_memory_is_bounded_for_files_of_the_longest_lines(stub_with: StartStub, tmp_path: Path) -> None:
    """Four files of lines of the maximum size are augmented within 300 MiB."""
    source = tmp_path / "in"
    source.mkdir()
    line = make_posting(text="x" * (MAX_LINE_BYTES - 100)) + b"\n"
    for name in "abcd":
        with (source / f"{name}.jsonl").open("wb") as file:
            for _ in range(24):
                file.write(line)
    assert _peak_mib(source, tmp_path / "out", "--target", stub_with().target) < 300
    assert [path.stat().st_size > 24 * MAX_LINE_BYTES - 2400 for path in (tmp_path / "out").iterdir()] == [
        True
    ] * 4


@pytest.mark.slow
def test_memory_is_bounded_for_uploads_of_rejected_lines(
    stub_with: StartStub, bucket: Bucket, tmp_path: Path
) -> None:
    """Four files of the longest lines, with every second line rejected, are augmented within 300 MiB."""
    source = tmp_path / "in"
    source.mkdir()
    good = make_posting(text="x" * (MAX_LINE_BYTES - 100)) + b"\n"
    bad = good.replace(b'"company"', b'"nothing"')
    for name in "abcd":
        (source / f"{name}.jsonl").write_bytes((good + bad) * 8)
    args = ("--target", stub_with().target, "--endpoint-url", bucket.endpoint_url, "--ok-rejects")
    peak = _peak_mib(source, f"s3://{bucket.name}/mod/", *args, env=dict(os.environ))
    assert peak < 300
    assert len(bucket.list_keys()) == 4 * 3
