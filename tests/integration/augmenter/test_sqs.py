"""`--sqs-queue-url` on a real queue and a real bucket: every message's way, and workers that share a day."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.augmenter.conftest import (
    MakeQueue,
    RunAugmenter,
    RunningStub,
    make_posting,
    sqs_run_args,
)
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_model
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket
from tests.support.sqs_server import SqsQueue, object_created_event


@pytest.mark.slow
def test_each_message_is_dealt_with(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue, tmp_path: Path
) -> None:
    """Files are done and their messages gone, a test event's and a duplicate's too; what is outside stays."""
    queue = make_queue()
    for key in ("raw/1.jsonl", "raw/a b+ü/2.jsonl"):
        bucket.put(key, make_posting())
    queue.send({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": bucket.name})
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    queue.send(object_created_event(bucket.name, "raw/a+b%2B%C3%BC%2F2.jsonl"))
    queue.send(object_created_event(bucket.name, "raw/notes.txt"))
    queue.send(object_created_event(bucket.name, "elsewhere/3.jsonl"))
    queue.send(object_created_event("another-bucket", "raw/1.jsonl"))
    ended = augment(*sqs_run_args(bucket, queue, stub.target), "--summary-json", tmp_path / "s.json")
    assert ended.exit_code == 0
    assert ended.stderr.count("is left in the queue: not about INPUT") == len(ended.stderr.splitlines()) == 2
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == [
        "mod/1.jsonl",
        "mod/a b+ü/2.jsonl",
    ]
    told = read_summary(tmp_path / "s.json")
    assert told["files"] == {"done": 2, "skipped": 1, "failed": 0}
    assert told["keys_outside"] == 2
    assert told["messages"] == {"left": 2, "not_understood": 0}
    assert queue.visible_count == 2  # their own consumer has them at once


@pytest.mark.slow
def test_what_is_left_does_not_hide_what_is_behind_it(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """A message that is not ours comes back while others wait: the run ends when the queue has no more."""
    queue = make_queue(visible_seconds=1)
    queue.send(object_created_event(bucket.name, "elsewhere/0.jsonl"))
    for i in range(60):
        bucket.put(f"raw/{i}.jsonl", make_posting())
        queue.send(object_created_event(bucket.name, f"raw/{i}.jsonl"))
    ended = augment(*sqs_run_args(bucket, queue, stub.target), "--concurrency", "1")
    assert ended.exit_code == 0
    assert "60 done" in ended.stdout
    assert queue.count() == 1


@pytest.mark.slow
def test_poison_goes_to_the_dead_letters(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """A message that is nothing and one of a file that cannot be done come back, until the queue gives up."""
    queue = make_queue(visible_seconds=1, receives=2)
    bucket.put("raw/1.jsonl", make_posting())
    queue.send("what is this?")
    queue.send(object_created_event(bucket.name, "raw/gone.jsonl"))
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    ended = augment(*sqs_run_args(bucket, queue, stub.target))
    assert ended.exit_code == 1
    assert "not an S3 event notification" in ended.stderr
    assert "gone.jsonl: does not exist" in ended.stderr
    for _ in range(2):
        wait_for(
            lambda: queue.visible_count or not queue.count(), description="the messages are visible again"
        )
        augment(*sqs_run_args(bucket, queue, stub.target))
    assert (queue.count(), queue.count(queue.dead_letter_url)) == (0, 2)
    assert bucket.get("mod/1.jsonl")


@pytest.mark.slow
def test_message_is_hidden_as_long_as_its_file_takes(bucket: Bucket, make_queue: MakeQueue) -> None:
    """A file that takes longer than the visibility timeout stays with its worker; killed, with the next."""
    queue = make_queue(visible_seconds=_VISIBLE_SECONDS)
    asked, again, go = threading.Event(), threading.Event(), threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        if call.pairs[0][0] == "Held":
            (again if asked.is_set() else asked).set()
            go.wait(60)
        return answer_all(call)

    def send(name: str, company: str) -> None:
        bucket.put(f"raw/{name}", make_posting(company))
        queue.send(object_created_event(bucket.name, f"raw/{name}"))

    with scripted_model(behave) as model:
        args = [*sqs_run_args(bucket, queue, model.target), "--watch", "--concurrency", "1"]
        send("held.jsonl", "Held")
        with augmenter_process(*args, env=dict(os.environ)) as first:
            assert asked.wait(30)
            until = time.monotonic() + 1.5 * _VISIBLE_SECONDS
            with augmenter_process(*args, env=dict(os.environ)):
                names = (f"{number}.jsonl" for number in itertools.count())
                while time.monotonic() < until:  # the other worker takes what there is, again and again
                    send(name := next(names), "Other")
                    _wait_for_output(bucket, name, unless=again)
                first.kill()
                assert again.wait(30)
                go.set()
                wait_for(lambda: queue.count() == 0, description="the message is gone")
    assert "mod/held.jsonl" in bucket.list_keys()


_VISIBLE_SECONDS = 3  # a third of it may pass between two renewals, and the rest on a busy machine


def _wait_for_output(bucket: Bucket, name: str, *, unless: threading.Event) -> None:
    wait_for(lambda: f"mod/{name}" in bucket.list_keys() or unless.is_set(), description=f"{name} is done")
    assert not unless.is_set()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "grace_seconds", "code"), [("--once", 0, 143), ("--watch", 20, 0)])
def test_sigterm_gives_the_message_back(
    bucket: Bucket, make_queue: MakeQueue, how: str, grace_seconds: int, code: int
) -> None:
    """A file that is not finished within the grace leaves no object, and its message to the next at once.

    So it is with a message that is not about INPUT.
    """
    queue = make_queue(visible_seconds=600)
    bucket.put("raw/1.jsonl", make_posting())
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    queue.send(object_created_event("another-bucket", "raw/1.jsonl"))
    asked, go = threading.Event(), threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        asked.set()
        go.wait(60)
        return answer_all(call)

    with (
        scripted_model(behave) as model,
        augmenter_process(*sqs_run_args(bucket, queue, model.target), how, env=dict(os.environ)) as process,
    ):
        assert asked.wait(30)
        assert process.stderr
        assert "is left in the queue" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(grace_seconds + 8) == code
        assert time.monotonic() - began >= grace_seconds - 1
        go.set()
    assert queue.visible_count == 2
    assert bucket.list_keys() == ["raw/1.jsonl"]


@pytest.mark.slow
def test_sigterm_ends_an_idle_worker(stub: RunningStub, bucket: Bucket, make_queue: MakeQueue) -> None:
    """SIGTERM ends `--watch` with 0 as soon as the receive under way does; what that brings is given back."""
    queue = make_queue(visible_seconds=600)
    bucket.put("raw/1.jsonl", make_posting())
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    with augmenter_process(
        *sqs_run_args(bucket, queue, stub.target), "--watch", env=dict(os.environ)
    ) as process:
        wait_for(lambda: queue.count() == 0, description="the file is done")
        process.send_signal(signal.SIGTERM)
        queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
        out, err = process.communicate(timeout=15)
    assert (process.returncode, err) == (0, "")
    assert "1 done, 0 skipped" in out
    assert queue.visible_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_workers_share_a_queue(
    stub: RunningStub, bucket: Bucket, make_queue: MakeQueue, tmp_path: Path, workers: int
) -> None:
    """However many workers take from one queue that tells all twice: every file is done, none twice."""
    queue = make_queue()
    files = 60
    for i in range(files):
        key = f"raw/{1714605540 + 60 * i}.jsonl"
        bucket.put(key, b"\n".join(make_posting(f"C{i}", id=line) for line in range(50)))
        for _ in range(2):
            queue.send(object_created_event(bucket.name, key))
    processes = [_start(bucket, queue, stub.target, tmp_path / f"{i}.json") for i in range(workers)]
    assert [process.wait(90) for process in processes] == [0] * workers
    told = [read_summary(tmp_path / f"{i}.json") for i in range(workers)]
    assert sum(one["files"]["done"] for one in told) == files
    # The stand-in's threads lose some of the deletions at the same moment: such a message comes once more.
    assert sum(one["files"]["skipped"] for one in told) >= files
    assert sum(one["lines"]["augmented"] for one in told) == files * 50
    assert len([key for key in bucket.list_keys() if key.startswith("mod/")]) == files
    assert queue.visible_count == 0  # not `count`, for the same reason


def _start(bucket: Bucket, queue: SqsQueue, target: str, path: Path) -> "subprocess.Popen[Any]":
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "services.augmenter",
            "run",
            *sqs_run_args(bucket, queue, target),
            "--summary-json",
            str(path),
        ],
        stdout=subprocess.DEVNULL,
    )
