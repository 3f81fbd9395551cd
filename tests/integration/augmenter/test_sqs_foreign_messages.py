"""Tests of messages in a real queue that are not about INPUT, among those that are."""

import os
import signal
from pathlib import Path

import pytest

from tests.integration.augmenter.conftest import MakeQueue, RunAugmenter, RunningStub, sqs_run_args
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.postings import make_posting
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket
from tests.support.sqs_server import object_created_event
from tests.unit.augmenter.sources.test_s3_events import cloudtrail, event_bridge, record


@pytest.mark.slow
def test_only_messages_about_input_are_deleted(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue, tmp_path: Path
) -> None:
    """Foreign and unreadable messages stay in the queue, each counted and named once, and the run ends."""
    queue = make_queue()
    for name in ("created", "trail a+b", "restored", "mixed"):
        bucket.put(f"raw/{name}.jsonl", make_posting())
    in_place = {"bucket": {"name": bucket.name}}
    trail = cloudtrail("PutObject")
    trail["detail"]["requestParameters"] = {"bucketName": bucket.name, "key": "raw/trail a+b.jsonl"}
    restored = event_bridge("Object Restore Completed")
    restored["detail"] = {**in_place, "object": {"key": "raw/restored.jsonl"}}
    removed = {"Records": [record("ObjectRemoved:Delete", bucket.name, "raw/gone.jsonl")]}
    for ours in (object_created_event(bucket.name, "raw/created.jsonl"), trail, restored, removed):
        queue.send(ours)
    foreign = [
        {"Records": [record("ObjectRemoved:Delete", "other-team", "x/1.jsonl")]},
        {"Records": [record("ObjectRestore:Completed", bucket.name, "raw-old/1.jsonl")]},
        object_created_event("another-bucket", "raw/created.jsonl"),
        {"Event": "s3:TestEvent", "Bucket": "another-bucket"},
        {"source": "aws.ec2", "detail-type": "EC2 Instance State-change Notification", "detail": {}},
        event_bridge("Object Deleted"),
        cloudtrail("PutObject"),
        {
            "Records": [
                *object_created_event(bucket.name, "raw/mixed.jsonl")["Records"],
                record("ObjectCreated:Put"),
            ]
        },
    ]
    unknown = ["what is this?", {"Records": [{}]}, [1]]
    for body in (*foreign, *unknown):
        queue.send(body)
    result = augment(*sqs_run_args(bucket, queue, stub.target), "--summary-json", tmp_path / "s.json")
    assert result.exit_code == 0
    assert {key for key in bucket.list_keys() if key.startswith("mod/")} == {
        f"mod/{name}.jsonl" for name in ("created", "trail a+b", "restored", "mixed")
    }
    assert queue.visible_count == len(foreign) + len(unknown)
    assert result.stderr.count("not about INPUT") == len(foreign)
    assert result.stderr.count("is left in the queue") == len(foreign) + len(unknown)
    assert read_summary(tmp_path / "s.json")["messages"] == {"left": 11, "not_understood": 3}
    assert "11 messages left in the queue: 8 not about INPUT, 3 not understood" in result.stdout


@pytest.mark.slow
def test_foreign_message_is_not_received_again_at_once(
    stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """Without a visibility timeout, a foreign message is received once in five seconds."""
    queue = make_queue(visible_seconds=0)
    bucket.put("raw/1.jsonl", make_posting())
    queue.send(object_created_event("another-bucket", "x/1.jsonl"))
    with augmenter_process(
        *sqs_run_args(bucket, queue, stub.target), "--watch", env=dict(os.environ)
    ) as process:
        wait_for(lambda: queue.visible_count == 0, description="the foreign message is hidden")
        queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
        wait_for(lambda: queue.count() == 1, description="ours is done and deleted")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err.count("is left in the queue")) == (0, 1)
    assert "1 messages left in the queue" in out


@pytest.mark.slow
def test_once_tries_a_failing_file_once(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """With --once, a failing file is tried once, even if its message comes back during the run."""
    queue = make_queue(visible_seconds=1, receives=1000)
    queue.send(object_created_event(bucket.name, "raw/gone.jsonl"))
    result = augment(*sqs_run_args(bucket, queue, stub.target))
    assert (result.exit_code, result.stderr.count("does not exist")) == (1, 1)
    assert queue.count() == 1


@pytest.mark.slow
def test_watch_names_a_failure_once(stub: RunningStub, bucket: Bucket, make_queue: MakeQueue) -> None:
    """With --watch, a failing file is logged once while its reason stays the same."""
    queue = make_queue(visible_seconds=1, receives=4)
    queue.send(object_created_event(bucket.name, "raw/gone.jsonl"))
    with augmenter_process(
        *sqs_run_args(bucket, queue, stub.target), "--watch", env=dict(os.environ)
    ) as process:
        wait_for(
            lambda: queue.count(queue.dead_letter_url) == 1,
            description="the queue gives the message up",
            timeout_seconds=30,
        )
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=20)
    assert err.count("WARNING services.augmenter") == 1
    # When it failed first, and at the end.
    assert err.count("raw/gone.jsonl: does not exist") == 2


@pytest.mark.slow
def test_message_of_a_file_without_a_valid_line_stays(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """The message of a file without a valid line is not deleted, even if rejected lines are tolerated."""
    queue = make_queue()
    bucket.put("raw/1.jsonl", b'{\n "company": "Acme",\n "title": "Clerk"\n}\n')
    bucket.put("raw/2.jsonl", b"company,title\nAcme,Clerk\n")
    for name in "12":
        queue.send(object_created_event(bucket.name, f"raw/{name}.jsonl"))
    result = augment(*sqs_run_args(bucket, queue, stub.target), "--ok-rejects")
    assert result.exit_code == 1
    assert "1.jsonl: it is JSON that spans several lines" in result.stderr
    assert "2.jsonl: no line can be augmented (2 rejected): line 1: not JSON" in result.stderr
    assert [key for key in bucket.list_keys() if key.startswith("mod/")] == []
    assert queue.count() == 2
