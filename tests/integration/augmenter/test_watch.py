"""`--watch` and `--shard` on folders: what is found, when it is tried again, how it ends."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from services.augmenter.sources.listing import FileLister, FileTask, Shard
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
    """Files that are there, that come, that come late and that change are done; SIGTERM ends it with 0."""
    source, sink = tmp_path / "in", tmp_path / "out"
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
def test_failed_file_is_told_and_tried_again(stub: RunningStub, tmp_path: Path) -> None:
    """A file that fails is one warning; when it can be done later, it is, and no failure is left."""
    source, sink = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    sink.mkdir()
    (sink / "a.jsonl").mkdir()  # where the output is to go
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
def test_sigterm_lets_the_files_in_work_be_finished(tmp_path: Path) -> None:
    """SIGTERM in mid-file: the file is finished within the grace, no other is begun."""
    source, sink = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "ab":
        (source / f"{name}.jsonl").write_bytes(make_posting(name))
    asked, go = threading.Event(), threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        asked.set()
        go.wait(30)
        return answer_all(call)

    args = (source, sink, "--watch", "--poll-interval", "50ms", "--concurrency", "1")
    with scripted_model(behave) as model, augmenter_process(*args, "--target", model.target) as process:
        assert asked.wait(30)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(TimeoutError):  # it waits for its file
            asyncio.run(asyncio.wait_for(asyncio.to_thread(process.wait, 0.3), 0.2))
        go.set()
        assert process.wait(20) == 0
    assert [path.name for path in sink.iterdir()] == ["a.jsonl"]


def test_shards_share_the_files(augment: RunAugmenter, stub: RunningStub, tmp_path: Path) -> None:
    """Two shards do all files, each file once."""
    source, sink = tmp_path / "in", tmp_path / "out"
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
    """What OUTPUT has of INPUT's names is seen side by side, whatever else is in either."""
    source, sink = tmp_path / "in", tmp_path / "out"
    for folder, names in ((source, "abcdeé"), (sink, "0bdxé")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.jsonl").write_bytes(make_posting())
    for name in "bé":
        status = (source / f"{name}.jsonl").stat()
        os.utime(sink / f"{name}.jsonl", ns=(status.st_mtime_ns, status.st_mtime_ns))
    os.utime(sink / "d.jsonl", ns=(1, 1))
    jobs = FileLister(LocalStore(source), LocalStore(sink), shard=Shard(), overwrite=False)
    seen = [(job.file.name[0], job.is_done, bool(job.expected_version)) async for job in jobs.list_tasks()]
    assert seen == [
        ("a", False, False),
        ("b", True, True),
        ("c", False, False),
        ("d", False, True),
        ("e", False, False),
        ("é", True, True),
    ]
    assert [job.file.name async for job in jobs.list_tasks(after="d")] == ["d.jsonl", "e.jsonl", "é.jsonl"]


async def test_lookback_counts_from_the_newest_name() -> None:
    """A later listing begins --lookback before the newest second that a name told, if it is not to come."""
    listed: list[str] = []

    async def listing(after: str) -> AsyncGenerator[FileTask]:
        listed.append(after)
        for name in ("1714605540.jsonl", "1714600000.jsonl", "9999999999.jsonl", "deep/1.jsonl"):
            yield FileTask(FileInfo(name, 1, "v", 0), name, PLAIN)

    watcher = Watcher(listing, _never_found, poll_interval_seconds=0.001, lookback_seconds=3600)
    jobs = watcher.tasks()
    given = [await anext(jobs) for _ in range(4)]
    watcher.on_end(given[3], "failed")
    assert (await anext(jobs)).file.name == "deep/1.jsonl"
    assert listed[:2] == ["", "1714601940"]


async def test_old_file_that_failed_is_tried_again() -> None:
    """A file that later listings pass is looked up by name until it is done, or gone."""
    names = ["1714000000.jsonl", "1714000001.jsonl", "1714605540.jsonl"]
    asked: list[str] = []

    async def listing(after: str) -> AsyncGenerator[FileTask]:
        for name in sorted(names):
            if name > after:
                yield _job(name)

    async def find(name: str) -> FileTask:
        asked.append(name)
        if name not in names:
            raise FileMissingError(uri=name, reason="does not exist")
        return _job(name)

    watcher = Watcher(listing, find, poll_interval_seconds=0.001, lookback_seconds=3600)
    jobs = watcher.tasks()
    given = [await anext(jobs) for _ in range(3)]
    names.remove("1714000001.jsonl")
    watcher.on_end(given[1], "failed")
    for _ in range(3):
        watcher.on_end(given[0], "failed")
        assert (await asyncio.wait_for(anext(jobs), 5)).file.name == "1714000000.jsonl"
    watcher.on_end(given[0], "done")
    names.append("1714605541.jsonl")
    assert (await asyncio.wait_for(anext(jobs), 5)).file.name == "1714605541.jsonl"
    assert asked.count("1714000000.jsonl") == 3
    assert asked.count("1714000001.jsonl") == 1


def _job(name: str) -> FileTask:
    return FileTask(FileInfo(name, 1, "v", 0), name, PLAIN)


async def _never_found(name: str) -> FileTask:
    raise FileMissingError(uri=name, reason="does not exist")
