"""Tests of `--watch` and `--shard` on folders: new files, retries and the end of the run."""

import asyncio
import signal
import threading
from pathlib import Path

import pytest

from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_model
from tests.support.postings import make_posting
from tests.support.redis_server import wait_for


@pytest.mark.slow
def test_new_files_are_done_until_sigterm(stub: RunningStub, tmp_path: Path) -> None:
    """`--watch` processes existing, new, late and changed files until SIGTERM, and ends with exit code 0."""
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
    """With `--watch`, a failed file is logged once and retried, and no failure remains once it is done."""
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
    """After SIGTERM, `--watch` finishes the current file within the grace, and begins no other."""
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
