"""Ends that nobody planned: signals, kill -9, inputs that change; never a partial output."""

import asyncio
import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from services.augmenter.errors import InputChangedError
from services.augmenter.object_store.local import LocalStore
from tests.augmenter.conftest import StubWith, posting
from tests.support.processes import ROOT, clean_environment


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one file of several windows."""
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "a.jsonl").open("wb") as file:
        for i in range(60_000):
            file.write(posting(f"C{i}", id=i) + b"\n")
    return folder


@contextmanager
def _running(*args: object, env: dict[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """The command as a process, killed at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "services.augmenter", "run", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment() | {"PYTHONPATH": str(ROOT)} | (env or {}),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def _wait_for_bytes(sink: Path) -> None:
    """Until the run is in mid-file: its temporary file holds something."""
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size for path in sink.glob(".*")):
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)


@pytest.fixture
def slow(stub_with: StubWith) -> str:
    """A model that answers the first window, and is then too slow to end the file."""
    return stub_with("--rate", "30000", "--max-batch", "1000").target


def test_kill_leaves_no_partial_output_and_the_next_run_clears_up(
    source: Path, tmp_path: Path, slow: str
) -> None:
    """A kill -9 in mid-file leaves at most a hidden file, which the next run of that file removes."""
    sink = tmp_path / "out"
    with _running(source, sink, "--target", slow) as process:
        _wait_for_bytes(sink)
        process.kill()
        process.wait()
    assert [name[0] for name in _files(sink)] == ["."]
    with _running(source, sink, "--target", slow) as again:
        assert again.wait(60) == 0
    assert _files(sink) == ["a.jsonl"]
    assert (sink / "a.jsonl").read_bytes().count(b"\n") == 60_000


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "augmenter: stopped by SIGTERM"), (signal.SIGINT, 130, "augmenter: interrupted")],
)
def test_signals_leave_nothing_behind(
    source: Path, tmp_path: Path, slow: str, number: signal.Signals, code: int, said: str
) -> None:
    """SIGTERM and SIGINT in mid-file end the run with one line and a code of their own, and leave no file."""
    sink = tmp_path / "out"
    with _running(source, sink, "--target", slow) as process:
        _wait_for_bytes(sink)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert (out, err.strip().count("\n")) == ("", 0)
    assert err.strip().startswith(said)
    assert _files(sink) == []


async def test_input_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """An input that grows under the reader is no whole file: an error, not a shorter output."""
    (tmp_path / "a.jsonl").write_bytes(posting())
    store = LocalStore(tmp_path)
    item = await store.find("a.jsonl")
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputChangedError):
        [data async for data in store.read(item)]


async def test_metrics_while_it_runs(source: Path, tmp_path: Path, slow: str) -> None:
    """The HTTP endpoint answers during the run, with every metric of the augmenter."""
    args = (source, tmp_path / "out", "--target", slow, "--http-listen", "127.0.0.1:0")
    with _running(*args) as process:
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


@pytest.mark.slow
def test_memory_stays_bounded(stub_with: StubWith, tmp_path: Path) -> None:
    """A compressed file of 400 MB of text, and one with lines of 30 MB, are augmented within 300 MiB."""
    source = tmp_path / "in"
    source.mkdir()
    block = b"".join(posting(f"C{i % 500}", id=i, text="x" * 120) + b"\n" for i in range(20_000))
    with gzip.open(source / "many.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(110):
            file.write(block)
    long = posting(text="x" * 30 * 2**20)
    (source / "long.jsonl").write_bytes(b"\n".join([long] * 4))
    with _running(source, tmp_path / "out", "--target", stub_with().target) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss * 1024 < 300 * 2**20
