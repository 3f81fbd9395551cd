"""The augmenter and the proxy as processes: whichever is killed, or told to stop, no line is lost."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.augmenter.conftest import make_posting
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_level, scripted_model
from tests.support.processes import ServiceProcess, run_service
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket

pytestmark = pytest.mark.slow

_LINES, _LINES_A_PAIR = 24_000, 100
_FIRST_HELD_PAIR = 160  # behind 16 MB of text, which are two parts of the output
_SOON_SECONDS = 8


def _lines(name: str, count: int = _LINES) -> list[bytes]:
    return [make_posting(f"{name}{i // _LINES_A_PAIR}", id=i, text="x" * 1_000) for i in range(count)]


def _augmented(name: str, count: int = _LINES) -> bytes:
    levels = [scripted_level(f"{name}{i}", "Clerk") for i in range(count // _LINES_A_PAIR + 1)]
    return b"".join(
        line[:-1] + b', "seniority": %d}\n' % levels[i // _LINES_A_PAIR]
        for i, line in enumerate(_lines(name, count))
    )


@dataclass(frozen=True)
class PausedModel:
    """A model that answers what an output's first parts need, and the rest when it is let."""

    target: str
    pause_reached: threading.Event = field(default_factory=threading.Event)
    resume: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def halfway() -> Iterator[PausedModel]:
    """One that is let at the latest when the test is over."""
    made = PausedModel("")

    def behave(call: ReceivedCall) -> Answers:
        if any(int(company[1:]) >= _FIRST_HELD_PAIR for company, _ in call.pairs):
            made.pause_reached.set()
            made.resume.wait(60)
        return answer_all(call)

    with scripted_model(behave) as model:
        yield PausedModel(model.target, made.pause_reached, made.resume)
        made.resume.set()


def _args(bucket: Bucket, target: str) -> list[str]:
    places = [f"s3://{bucket.name}/raw/", f"s3://{bucket.name}/mod/"]
    return [*places, "--target", target, "--endpoint-url", bucket.endpoint_url]


def _wait_for_parts(bucket: Bucket, halfway: PausedModel) -> None:
    """Until the run is in the middle of its upload."""
    assert halfway.pause_reached.wait(30)
    wait_for(lambda: bucket.count_unfinished_uploads() == 1, description="an upload is begun")


def test_kill_in_the_middle_of_an_upload_costs_one_file(
    bucket: Bucket, halfway: PausedModel, tmp_path: Path
) -> None:
    """After a kill -9 no object is seen; the next run does that file once, and what was done not again."""
    bucket.put("raw/1.jsonl", make_posting("B0"))
    etag = bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    args = [*_args(bucket, halfway.target), "--summary-json", tmp_path / "s.json"]
    with augmenter_process(*args, env=dict(os.environ)) as process:
        _wait_for_parts(bucket, halfway)
        wait_for(lambda: "mod/1.jsonl" in bucket.list_keys(), description="the small file is done")
        process.kill()
        process.wait()
    assert bucket.list_keys() == ["mod/1.jsonl", "raw/1.jsonl", "raw/2.jsonl"]
    halfway.resume.set()
    with augmenter_process(*args, env=dict(os.environ)) as again:
        assert again.communicate(timeout=60)[1] == ""
        assert again.returncode == 0
    told = read_summary(tmp_path / "s.json")
    assert told["files"] == {"done": 1, "skipped": 1, "failed": 0}
    assert told["lines"]["augmented"] == _LINES
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


def test_proxy_that_is_killed_and_started_again_costs_retries(tmp_path: Path) -> None:
    """A proxy that dies under a run, and is on its port again later: no file fails, every line is right."""
    source, sink = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "ABC":
        (source / f"{name}.jsonl").write_bytes(b"\n".join(_lines(name, 6_000)))
    asked, killed = threading.Event(), threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        if call.number >= 2:
            asked.set()
            killed.wait(30)
        return answer_all(call)

    args = (source, sink, "--batch-size", "20", "--summary-json", tmp_path / "s.json")
    with (
        scripted_model(behave) as model,
        _proxy(model.target, "127.0.0.1:0") as first,
        augmenter_process(*args, "--target", first.target) as process,
    ):
        assert process.stderr
        assert asked.wait(30)
        first.stop(signal.SIGKILL)
        killed.set()
        assert "retrying" in process.stderr.readline()
        with _proxy(model.target, first.target):
            assert process.wait(60) == 0
        assert "answers again" in process.stderr.read()
    assert read_summary(tmp_path / "s.json")["files"] == {"done": 3, "skipped": 0, "failed": 0}
    for name in "ABC":
        assert (sink / f"{name}.jsonl").read_bytes() == _augmented(name, 6_000)


def test_sigterm_abandons_an_upload(bucket: Bucket, halfway: PausedModel) -> None:
    """SIGTERM in the middle of an upload ends `--once` with 143 and leaves neither an object nor parts."""
    bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    with augmenter_process(*_args(bucket, halfway.target), env=dict(os.environ)) as process:
        _wait_for_parts(bucket, halfway)
        process.send_signal(signal.SIGTERM)
        assert process.wait(_SOON_SECONDS) == 143
    assert bucket.list_keys() == ["raw/2.jsonl"]
    assert bucket.count_unfinished_uploads() == 0


def test_sigterm_lets_an_upload_be_finished(bucket: Bucket, halfway: PausedModel) -> None:
    """SIGTERM in the middle of an upload: `--watch` completes it, whole, and ends with 0."""
    bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    with augmenter_process(*_args(bucket, halfway.target), "--watch", env=dict(os.environ)) as process:
        _wait_for_parts(bucket, halfway)
        process.send_signal(signal.SIGTERM)
        halfway.resume.set()
        assert process.wait(20) == 0
    assert bucket.get("mod/2.jsonl") == _augmented("C")
    assert bucket.count_unfinished_uploads() == 0


def test_sigterm_ends_an_idle_watch_at_once(bucket: Bucket, halfway: PausedModel) -> None:
    """With nothing to do, `--watch` does not wait for its next listing to end with 0."""
    bucket.put("raw/1.jsonl", make_posting("B0"))
    args = [*_args(bucket, halfway.target), "--watch", "--poll-interval", "1h"]
    with augmenter_process(*args, env=dict(os.environ)) as process:
        wait_for(lambda: "mod/1.jsonl" in bucket.list_keys(), description="the file is done")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=_SOON_SECONDS)
    assert (process.returncode, err) == (0, "")
    assert "1 done" in out
