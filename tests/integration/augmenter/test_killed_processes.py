"""Tests of augmenter and proxy as processes: whichever is killed or stopped, no line is lost."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_level, scripted_model
from tests.support.postings import make_posting
from tests.support.processes import ServiceProcess, run_service
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket

pytestmark = pytest.mark.slow

_LINES = 24_000
_LINES_PER_PAIR = 100
# After 16 MB of text, which are two parts of the output.
_FIRST_PAUSED_PAIR = 160
_MAX_EXIT_SECONDS = 8


def _lines(name: str, count: int = _LINES) -> list[bytes]:
    return [make_posting(f"{name}{i // _LINES_PER_PAIR}", id=i, text="x" * 1_000) for i in range(count)]


def _augmented(name: str, count: int = _LINES) -> bytes:
    levels = [scripted_level(f"{name}{i}", "Clerk") for i in range(count // _LINES_PER_PAIR + 1)]
    return b"".join(
        line[:-1] + b', "seniority": %d}\n' % levels[i // _LINES_PER_PAIR]
        for i, line in enumerate(_lines(name, count))
    )


@dataclass(frozen=True)
class PausedModel:
    """A model that answers what an output's first parts need, and the rest once `resume` is set."""

    target: str
    pause_reached: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def paused_model() -> Iterator[PausedModel]:
    """Start a model that is released at the latest when the test ends."""
    events = PausedModel("")

    def behave(call: ReceivedCall) -> Answers:
        if any(int(company[1:]) >= _FIRST_PAUSED_PAIR for company, _ in call.pairs):
            events.pause_reached.set()
            events.resume.wait(60)
        return answer_all(call)

    with scripted_model(behave) as model:
        yield PausedModel(model.target, events.pause_reached, events.resume)
        events.resume.set()


def _args(bucket: Bucket, target: str) -> list[str]:
    places = [f"s3://{bucket.name}/raw/", f"s3://{bucket.name}/mod/"]
    return [*places, "--target", target, "--endpoint-url", bucket.endpoint_url]


def _wait_for_parts(bucket: Bucket, paused_model: PausedModel) -> None:
    """Wait until the run is in the middle of its upload."""
    assert paused_model.pause_reached.wait(30)
    wait_for(lambda: bucket.count_unfinished_uploads() == 1, description="an upload is begun")


def test_kill_during_an_upload_loses_one_file(
    bucket: Bucket, paused_model: PausedModel, tmp_path: Path
) -> None:
    """A run killed during an upload leaves no object, and the next run processes only that file."""
    bucket.put("raw/1.jsonl", make_posting("B0"))
    etag = bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    args = [*_args(bucket, paused_model.target), "--summary-json", tmp_path / "s.json"]
    with augmenter_process(*args, env=dict(os.environ)) as process:
        _wait_for_parts(bucket, paused_model)
        wait_for(lambda: "mod/1.jsonl" in bucket.list_keys(), description="the small file is done")
        process.kill()
        process.wait()
    assert bucket.list_keys() == ["mod/1.jsonl", "raw/1.jsonl", "raw/2.jsonl"]
    paused_model.resume.set()
    with augmenter_process(*args, env=dict(os.environ)) as again:
        assert again.communicate(timeout=60)[1] == ""
        assert again.returncode == 0
    totals = read_summary(tmp_path / "s.json")
    assert totals["files"] == {"done": 1, "skipped": 1, "failed": 0}
    assert totals["lines"]["augmented"] == _LINES
    assert bucket.list_keys() == ["mod/1.jsonl", "mod/2.jsonl", "raw/1.jsonl", "raw/2.jsonl"]
    assert bucket.get("mod/2.jsonl") == _augmented("C")
    assert bucket.input_etag("mod/2.jsonl") == etag


def _proxy(model_target: str, listen: str) -> AbstractContextManager[ServiceProcess]:
    return run_service(
        "services.cache_proxy",
        "serve",
        "--listen",
        listen,
        "--http-listen",
        "127.0.0.1:0",
        "--model-target",
        model_target,
        "--cache-url",
        "memory:",
        "--model-rate",
        "1000000",
        "--model-calls-per-second",
        "0",
    )


def test_restart_of_a_killed_proxy_fails_no_file(tmp_path: Path) -> None:
    """If the proxy is killed during a run and restarted, RPCs are retried and no file fails."""
    source = tmp_path / "in"
    sink = tmp_path / "out"
    source.mkdir()
    for name in "ABC":
        (source / f"{name}.jsonl").write_bytes(b"\n".join(_lines(name, 6_000)))
    call_received = threading.Event()
    killed = threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        if call.number >= 2:
            call_received.set()
            killed.wait(30)
        return answer_all(call)

    args = (source, sink, "--batch-size", "20", "--summary-json", tmp_path / "s.json")
    with (
        scripted_model(behave) as model,
        _proxy(model.target, "127.0.0.1:0") as first,
        augmenter_process(*args, "--target", first.target) as process,
    ):
        assert process.stderr
        assert call_received.wait(30)
        first.stop(signal.SIGKILL)
        killed.set()
        assert "retrying" in process.stderr.readline()
        with _proxy(model.target, first.target):
            assert process.wait(60) == 0
        assert "answers again" in process.stderr.read()
    assert read_summary(tmp_path / "s.json")["files"] == {"done": 3, "skipped": 0, "failed": 0}
    for name in "ABC":
        assert (sink / f"{name}.jsonl").read_bytes() == _augmented(name, 6_000)


def test_sigterm_aborts_an_upload(bucket: Bucket, paused_model: PausedModel) -> None:
    """SIGTERM during an upload ends `--once` with exit code 143, and leaves neither an object nor parts."""
    bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    with augmenter_process(*_args(bucket, paused_model.target), env=dict(os.environ)) as process:
        _wait_for_parts(bucket, paused_model)
        process.send_signal(signal.SIGTERM)
        assert process.wait(_MAX_EXIT_SECONDS) == 143
    assert bucket.list_keys() == ["raw/2.jsonl"]
    assert bucket.count_unfinished_uploads() == 0


def test_sigterm_of_watch_completes_an_upload(bucket: Bucket, paused_model: PausedModel) -> None:
    """SIGTERM during an upload lets `--watch` complete it and end with exit code 0."""
    bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    with augmenter_process(*_args(bucket, paused_model.target), "--watch", env=dict(os.environ)) as process:
        _wait_for_parts(bucket, paused_model)
        process.send_signal(signal.SIGTERM)
        paused_model.resume.set()
        assert process.wait(20) == 0
    assert bucket.get("mod/2.jsonl") == _augmented("C")
    assert bucket.count_unfinished_uploads() == 0


def test_sigterm_ends_an_idle_watch_at_once(bucket: Bucket, paused_model: PausedModel) -> None:
    """SIGTERM ends an idle `--watch` at once, without waiting for its next listing."""
    bucket.put("raw/1.jsonl", make_posting("B0"))
    args = [*_args(bucket, paused_model.target), "--watch", "--poll-interval", "1h"]
    with augmenter_process(*args, env=dict(os.environ)) as process:
        wait_for(lambda: "mod/1.jsonl" in bucket.list_keys(), description="the file is done")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=_MAX_EXIT_SECONDS)
    assert (process.returncode, err) == (0, "")
    assert "1 done" in out
