"""Tests of `--watch` and `--shard` on folders: new files, retries and the end of the run."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from services.augmenter.domain import FileTask
from services.augmenter.sources.listing import FileLister, Shard
from services.augmenter.sources.watch import Watcher
from services.common.codec import PLAIN
from services.common.storage.errors import FileMissingError
from services.common.storage.local import LocalStore
from services.common.storage.protocol import FileInfo
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub, make_posting
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_model
from tests.support.redis_server import wait_for


@pytest.mark.slow
def test_new_files_are_done_until_sigterm(stub: RunningStub, tmp_path: Path) -> None:
    """Existing, new, late and changed files are processed. SIGTERM ends the run with 0."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    source.mkdir()
    (source / "1714605540.jsonl").write_bytes(make_posting())
    args = (source, sink, "--watch", "--poll-interval", "50ms", "--target", stub.target)
    with augmenter_process(*args, "--summary-json", tmp_path / "s.json") as process:
        wait_for((sink / "1714605540.jsonl").exists, description="the first file is done")
        (source / "1714605600.jsonl").write_bytes(make_posting())
        wait_for((sink / "1714605600.jsonl").exists, description="a new file is done")
        (source / "1714605000.jsonl").write_bytes(make_posting())
        wait_for((sink / "1714605000.jsonl").exists, description="a file that came late is done")
        (source / "1714605540.jsonl").write_bytes(make_posting(title="Chief"))
        wait_for(lambda: b"Chief" in (sink / "1714605540.jsonl").read_bytes(), description="a change is done")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "4 done, 0 skipped, 0 failed" in out
    assert read_summary(tmp_path / "s.json")["lines"]["augmented"] == 4


@pytest.mark.slow
def test_failed_file_is_logged_and_retried(stub: RunningStub, tmp_path: Path) -> None:
    """A file that fails is one warning. Once it can be processed it is, and no failure remains."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    source.mkdir()
    sink.mkdir()
    # This folder is at the path of the output.
    (sink / "a.jsonl").mkdir()
    (source / "a.jsonl").write_bytes(make_posting())
    with augmenter_process(
        source, sink, "--watch", "--poll-interval", "50ms", "--target", stub.target
    ) as process:
        assert process.stderr
        assert "a folder stands there" in process.stderr.readline()
        (sink / "a.jsonl").rmdir()
        wait_for((sink / "a.jsonl").is_file, description="the file is done after all")
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
    assert "1 done, 0 skipped, 0 failed" in out


@pytest.mark.slow
def test_sigterm_completes_files_in_progress(tmp_path: Path) -> None:
    """After SIGTERM, the current file is finished within the grace, and no other is begun."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.jsonl").write_bytes(make_posting(name))
    call_received = threading.Event()
    resume = threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        call_received.set()
        resume.wait(30)
        return answer_all(call)

    args = (source, sink, "--watch", "--poll-interval", "50ms", "--concurrency", "1")
    with scripted_model(behave) as model, augmenter_process(*args, "--target", model.target) as process:
        assert call_received.wait(30)
        process.send_signal(signal.SIGTERM)
        # The process waits for its file.
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(asyncio.to_thread(process.wait, 0.3), 0.2))
        resume.set()
        assert process.wait(20) == 0
    assert [path.name for path in sink.iterdir()] == ["a.jsonl"]


def test_shards_share_the_files(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """Two shards process all files, each file once."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.jsonl").write_bytes(make_posting())
    done = []
    for i in range(2):
        path = tmp_path / f"{i}.json"
        assert (
            augment(
                source, sink, "--shard", f"{i}/2", "--target", stub.target, "--summary-json", path
            ).exit_code
            == 0
        )
        done.append(read_summary(path)["files"])
    assert all(files["done"] > 0 and files["skipped"] == 0 for files in done)
    assert sum(files["done"] for files in done) == len(list(sink.iterdir())) == 20


async def test_listings_are_merged(tmp_path: Path) -> None:
    """The outputs of INPUT's names are found, whatever other names both folders have."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    for folder, names in ((source, "abcdeé"), (sink, "0bdxé")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jsonl").write_bytes(make_posting())
    for name in "bé":
        status = (source / f"{name}.jsonl").stat()
        os.utime(sink / f"{name}.jsonl", ns=(status.st_mtime_ns, status.st_mtime_ns))
    os.utime(sink / "d.jsonl", ns=(1, 1))
    lister = FileLister(LocalStore(source), LocalStore(sink), shard=Shard(), overwrite=False)
    states = [
        (task.file.name[0], task.is_done, bool(task.expected_version)) async for task in lister.list_tasks()
    ]
    assert states == [
        ("a", False, False),
        ("b", True, True),
        ("c", False, False),
        ("d", False, True),
        ("e", False, False),
        ("é", True, True),
    ]
    assert [task.file.name async for task in lister.list_tasks(after="d")] == [
        "d.jsonl",
        "e.jsonl",
        "é.jsonl",
    ]


async def test_lookback_counts_from_the_newest_name() -> None:
    """A later listing begins --lookback before the newest time in a name that is not in the future."""
    listed_after: list[str] = []

    async def listing(after: str) -> AsyncGenerator[FileTask]:
        listed_after.append(after)
        for name in ("1714605540.jsonl", "1714600000.jsonl", "9999999999.jsonl", "deep/1.jsonl"):
            yield FileTask(FileInfo(name, 1, "v", 0), name, PLAIN)

    watcher = Watcher(listing, _find_nothing, poll_interval_seconds=0.001, lookback_seconds=3600)
    tasks = watcher.tasks()
    yielded = [await anext(tasks) for _ in range(4)]
    watcher.on_end(yielded[3], "failed")
    assert (await anext(tasks)).file.name == "deep/1.jsonl"
    assert listed_after[:2] == ["", "1714601940"]


async def test_failed_file_is_retried_after_the_lookback() -> None:
    """A file that later listings pass is looked up by name until it is done, or gone."""
    names = ["1714000000.jsonl", "1714000001.jsonl", "1714605540.jsonl"]
    looked_up: list[str] = []

    async def listing(after: str) -> AsyncGenerator[FileTask]:
        for name in sorted(names):
            if name > after:
                yield _task(name)

    async def find(name: str) -> FileTask:
        looked_up.append(name)
        if name not in names:
            raise FileMissingError(uri=name, reason="does not exist")
        return _task(name)

    watcher = Watcher(listing, find, poll_interval_seconds=0.001, lookback_seconds=3600)
    tasks = watcher.tasks()
    yielded = [await anext(tasks) for _ in range(3)]
    names.remove("1714000001.jsonl")
    watcher.on_end(yielded[1], "failed")
    for _ in range(3):
        watcher.on_end(yielded[0], "failed")
        assert (await asyncio.wait_for(anext(tasks), 5)).file.name == "1714000000.jsonl"
    watcher.on_end(yielded[0], "done")
    names.append("1714605541.jsonl")
    assert (await asyncio.wait_for(anext(tasks), 5)).file.name == "1714605541.jsonl"
    assert looked_up.count("1714000000.jsonl") == 3
    assert looked_up.count("1714000001.jsonl") == 1


def _task(name: str) -> FileTask:
    return FileTask(FileInfo(name, 1, "v", 0), name, PLAIN)


async def _find_nothing(name: str) -> FileTask:
    raise FileMissingError(uri=name, reason="does not exist")
