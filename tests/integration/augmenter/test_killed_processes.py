"""The augmenter and the proxy as processes: whichever is killed, or told to stop, no line is lost."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.integration.augmenter.conftest import posting
from tests.support.augmenter_process import running, summary
from tests.support.model_server import Answers, Call, level_of, scripted_model, well
from tests.support.processes import Service, service
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket

pytestmark = pytest.mark.slow

_LINES, _LINES_A_PAIR = 24_000, 100
_FIRST_HELD_PAIR = 160  # behind 16 MB of text, which are two parts of the output
_SOON_SECONDS = 8


def _lines(name: str, count: int = _LINES) -> list[bytes]:
    return [posting(f"{name}{i // _LINES_A_PAIR}", id=i, text="x" * 1_000) for i in range(count)]


def _augmented(name: str, count: int = _LINES) -> bytes:
    levels = [level_of(f"{name}{i}", "Clerk") for i in range(count // _LINES_A_PAIR + 1)]
    return b"".join(
        line[:-1] + b', "seniority": %d}\n' % levels[i // _LINES_A_PAIR]
        for i, line in enumerate(_lines(name, count))
    )


@dataclass(frozen=True)
class Halfway:
    """A model that answers what an output's first parts need, and the rest when it is let."""

    target: str
    asked: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def halfway() -> Iterator[Halfway]:
    """One that is let at the latest when the test is over."""
    made = Halfway("")

    def behave(call: Call) -> Answers:
        if any(int(company[1:]) >= _FIRST_HELD_PAIR for company, _ in call.pairs):
            made.asked.set()
            made.go.wait(60)
        return well(call)

    with scripted_model(behave) as model:
        yield Halfway(model.target, made.asked, made.go)
        made.go.set()


def _args(bucket: Bucket, target: str) -> list[str]:
    places = [f"s3://{bucket.name}/raw/", f"s3://{bucket.name}/mod/"]
    return [*places, "--target", target, "--endpoint-url", bucket.endpoint_url]


def _wait_for_parts(bucket: Bucket, halfway: Halfway) -> None:
    """Until the run is in the middle of its upload."""
    assert halfway.asked.wait(30)
    wait_for(lambda: bucket.unfinished() == 1, what="an upload is begun")


def test_kill_in_the_middle_of_an_upload_costs_one_file(
    bucket: Bucket, halfway: Halfway, tmp_path: Path
) -> None:
    """After a kill -9 no object is seen; the next run does that file once, and what was done not again."""
    bucket.put("raw/1.jsonl", posting("B0"))
    etag = bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    args = [*_args(bucket, halfway.target), "--summary-json", tmp_path / "s.json"]
    with running(*args, env=dict(os.environ)) as process:
        _wait_for_parts(bucket, halfway)
        wait_for(lambda: "mod/1.jsonl" in bucket.listed(), what="the small file is done")
        process.kill()
        process.wait()
    assert bucket.listed() == ["mod/1.jsonl", "raw/1.jsonl", "raw/2.jsonl"]
    halfway.go.set()
    with running(*args, env=dict(os.environ)) as again:
        assert again.communicate(timeout=60)[1] == ""
        assert again.returncode == 0
    told = summary(tmp_path / "s.json")
    assert told["files"] == {"done": 1, "skipped": 1, "failed": 0}
    assert told["lines"]["augmented"] == _LINES
    assert bucket.listed() == ["mod/1.jsonl", "mod/2.jsonl", "raw/1.jsonl", "raw/2.jsonl"]
    assert bucket.get("mod/2.jsonl") == _augmented("C")
    assert bucket.mark("mod/2.jsonl") == etag


def _proxy(model_target: str, listen: str) -> AbstractContextManager[Service]:
    return service(
        "services.cache_proxy", "serve", "--listen", listen, "--http-listen", "127.0.0.1:0",
        "--model-target", model_target, "--cache-url", "memory:",
        "--model-rate", "1000000", "--model-calls-per-second", "0",
    )  # fmt: skip


def test_proxy_that_is_killed_and_started_again_costs_retries(tmp_path: Path) -> None:
    """A proxy that dies under a run, and is on its port again later: no file fails, every line is right."""
    source, sink = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in "ABC":
        (source / f"{name}.jsonl").write_bytes(b"\n".join(_lines(name, 6_000)))
    asked, killed = threading.Event(), threading.Event()

    def behave(call: Call) -> Answers:
        if call.number >= 2:
            asked.set()
            killed.wait(30)
        return well(call)

    args = (source, sink, "--batch-size", "20", "--summary-json", tmp_path / "s.json")
    with (
        scripted_model(behave) as model,
        _proxy(model.target, "127.0.0.1:0") as first,
        running(*args, "--target", first.target) as process,
    ):
        assert process.stderr
        assert asked.wait(30)
        first.stop(signal.SIGKILL)
        killed.set()
        assert "retrying" in process.stderr.readline()
        with _proxy(model.target, first.target):
            assert process.wait(60) == 0
        assert "answers again" in process.stderr.read()
    assert summary(tmp_path / "s.json")["files"] == {"done": 3, "skipped": 0, "failed": 0}
    for name in "ABC":
        assert (sink / f"{name}.jsonl").read_bytes() == _augmented(name, 6_000)


def test_sigterm_abandons_an_upload(bucket: Bucket, halfway: Halfway) -> None:
    """SIGTERM in the middle of an upload ends `--once` with 143 and leaves neither an object nor parts."""
    bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    with running(*_args(bucket, halfway.target), env=dict(os.environ)) as process:
        _wait_for_parts(bucket, halfway)
        process.send_signal(signal.SIGTERM)
        assert process.wait(_SOON_SECONDS) == 143
    assert bucket.listed() == ["raw/2.jsonl"]
    assert bucket.unfinished() == 0


def test_sigterm_lets_an_upload_be_finished(bucket: Bucket, halfway: Halfway) -> None:
    """SIGTERM in the middle of an upload: `--watch` completes it, whole, and ends with 0."""
    bucket.put("raw/2.jsonl", b"\n".join(_lines("C")))
    with running(*_args(bucket, halfway.target), "--watch", env=dict(os.environ)) as process:
        _wait_for_parts(bucket, halfway)
        process.send_signal(signal.SIGTERM)
        halfway.go.set()
        assert process.wait(20) == 0
    assert bucket.get("mod/2.jsonl") == _augmented("C")
    assert bucket.unfinished() == 0


def test_sigterm_ends_an_idle_watch_at_once(bucket: Bucket, halfway: Halfway) -> None:
    """With nothing to do, `--watch` does not wait for its next listing to end with 0."""
    bucket.put("raw/1.jsonl", posting("B0"))
    args = [*_args(bucket, halfway.target), "--watch", "--poll-interval", "1h"]
    with running(*args, env=dict(os.environ)) as process:
        wait_for(lambda: "mod/1.jsonl" in bucket.listed(), what="the file is done")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=_SOON_SECONDS)
    assert (process.returncode, err) == (0, "")
    assert "1 done" in out
