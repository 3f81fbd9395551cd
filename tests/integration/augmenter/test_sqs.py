"""Tests of `--sqs-queue-url` on a real queue and bucket: outcomes of messages, and several workers."""

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

from tests.integration.augmenter.conftest import MakeQueue, RunAugmenter, RunningStub, sqs_run_args
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_model
from tests.support.postings import make_posting
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket
from tests.support.sqs_server import SqsQueue, object_created_event


@pytest.mark.slow
def test_messages_about_input_are_deleted_and_others_stay(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue, tmp_path: Path
) -> None:
    """Messages about INPUT are deleted once their files are done, duplicates and test events included.

    Messages about other buckets and prefixes stay in the queue.
    """
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
    result = augment(*sqs_run_args(bucket, queue, stub.target), "--summary-json", tmp_path / "s.json")
    assert result.exit_code == 0
    assert (
        result.stderr.count("is left in the queue: not about INPUT") == len(result.stderr.splitlines()) == 2
    )
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == [
        "mod/1.jsonl",
        "mod/a b+ü/2.jsonl",
    ]
    totals = read_summary(tmp_path / "s.json")
    assert totals["files"] == {"done": 2, "skipped": 1, "failed": 0}
    assert totals["keys_outside"] == 2
    assert totals["messages"] == {"left": 2, "not_understood": 0}
    # Their own consumer can receive them at once.
    assert queue.visible_count == 2


@pytest.mark.slow
def test_foreign_message_does_not_hide_the_others(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """A foreign message that comes back does not keep a run from the messages after it, or from its end."""
    queue = make_queue(visible_seconds=1)
    queue.send(object_created_event(bucket.name, "elsewhere/0.jsonl"))
    for i in range(60):
        bucket.put(f"raw/{i}.jsonl", make_posting())
        queue.send(object_created_event(bucket.name, f"raw/{i}.jsonl"))
    result = augment(*sqs_run_args(bucket, queue, stub.target), "--concurrency", "1")
    assert result.exit_code == 0
    assert "60 done" in result.stdout
    assert queue.count() == 1


@pytest.mark.slow
def test_failing_messages_go_to_the_dead_letter_queue(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """Unreadable messages and those of failing files come back until the redrive policy moves them."""
    queue = make_queue(visible_seconds=1, receives=2)
    bucket.put("raw/1.jsonl", make_posting())
    queue.send("what is this?")
    queue.send(object_created_event(bucket.name, "raw/gone.jsonl"))
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    result = augment(*sqs_run_args(bucket, queue, stub.target))
    assert result.exit_code == 1
    assert "not an S3 event notification" in result.stderr
    assert "gone.jsonl: does not exist" in result.stderr
    for _ in range(2):
        wait_for(
            lambda: queue.visible_count or not queue.count(), description="the messages are visible again"
        )
        augment(*sqs_run_args(bucket, queue, stub.target))
    assert (queue.count(), queue.count(queue.dead_letter_url)) == (0, 2)
    assert bucket.get("mod/1.jsonl")


@pytest.mark.slow
def test_message_stays_hidden_while_its_file_is_in_progress(bucket: Bucket, make_queue: MakeQueue) -> None:
    """A message stays hidden while its worker lives, even for longer than the visibility timeout.

    If the worker is killed, another worker receives the message.
    """
    queue = make_queue(visible_seconds=_VISIBLE_SECONDS)
    first_received = threading.Event()
    received_again = threading.Event()
    resume = threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        if call.pairs[0][0] == "Held":
            (received_again if first_received.is_set() else first_received).set()
            resume.wait(60)
        return answer_all(call)

    def send(name: str, company: str) -> None:
        bucket.put(f"raw/{name}", make_posting(company))
        queue.send(object_created_event(bucket.name, f"raw/{name}"))

    with scripted_model(behave) as model:
        args = [*sqs_run_args(bucket, queue, model.target), "--watch", "--concurrency", "1"]
        send("held.jsonl", "Held")
        with augmenter_process(*args, env=dict(os.environ)) as first:
            assert first_received.wait(30)
            until = time.monotonic() + 1.5 * _VISIBLE_SECONDS
            with augmenter_process(*args, env=dict(os.environ)):
                names = (f"{number}.jsonl" for number in itertools.count())
                # The other worker processes new files all the time, and must not receive the held one.
                while time.monotonic() < until:
                    send(name := next(names), "Other")
                    _wait_for_output(bucket, name, unless=received_again)
                first.kill()
                assert received_again.wait(30)
                resume.set()
                wait_for(lambda: queue.count() == 0, description="the message is gone")
    assert "mod/held.jsonl" in bucket.list_keys()


# A third of it may pass between two extensions, and the rest on a busy machine.
_VISIBLE_SECONDS = 3


def _wait_for_output(bucket: Bucket, name: str, *, unless: threading.Event) -> None:
    wait_for(lambda: f"mod/{name}" in bucket.list_keys() or unless.is_set(), description=f"{name} is done")
    assert not unless.is_set()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "grace_seconds", "code"), [("--once", 0, 143), ("--watch", 20, 0)])
def test_sigterm_releases_messages(
    bucket: Bucket, make_queue: MakeQueue, mode: str, grace_seconds: int, code: int
) -> None:
    """SIGTERM makes the messages of unfinished files visible at once, and such files leave no object.

    The same is true of a message that is not about INPUT.
    """
    queue = make_queue(visible_seconds=600)
    bucket.put("raw/1.jsonl", make_posting())
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    queue.send(object_created_event("another-bucket", "raw/1.jsonl"))
    call_received = threading.Event()
    resume = threading.Event()

    def behave(call: ReceivedCall) -> Answers:
        call_received.set()
        resume.wait(60)
        return answer_all(call)

    with (
        scripted_model(behave) as model,
        augmenter_process(*sqs_run_args(bucket, queue, model.target), mode, env=dict(os.environ)) as process,
    ):
        assert call_received.wait(30)
        assert process.stderr
        assert "is left in the queue" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(grace_seconds + 8) == code
        assert time.monotonic() - started >= grace_seconds - 1
        resume.set()
    assert queue.visible_count == 2
    assert bucket.list_keys() == ["raw/1.jsonl"]


@pytest.mark.slow
def test_sigterm_ends_an_idle_worker(stub: RunningStub, bucket: Bucket, make_queue: MakeQueue) -> None:
    """SIGTERM ends an idle `--watch` after the current receive. A message that it returns is released."""
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
    """Any number of workers share a queue with duplicate messages, and each file is done exactly once."""
    queue = make_queue()
    files = 60
    for i in range(files):
        key = f"raw/{1714605540 + 60 * i}.jsonl"
        bucket.put(key, b"\n".join(make_posting(f"C{i}", id=line) for line in range(50)))
        for _ in range(2):
            queue.send(object_created_event(bucket.name, key))
    processes = [_start(bucket, queue, stub.target, tmp_path / f"{i}.json") for i in range(workers)]
    assert [process.wait(90) for process in processes] == [0] * workers
    totals = [read_summary(tmp_path / f"{i}.json") for i in range(workers)]
    assert sum(run_totals["files"]["done"] for run_totals in totals) == files
    # The SQS stand-in loses some of several simultaneous deletions: such a message comes once more.
    assert sum(run_totals["files"]["skipped"] for run_totals in totals) >= files
    assert sum(run_totals["lines"]["augmented"] for run_totals in totals) == files * 50
    assert len([key for key in bucket.list_keys() if key.startswith("mod/")]) == files
    # For the same reason, the check is not about `count`.
    assert queue.visible_count == 0


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
