"""Objects that cannot be read now: in cold storage, or gone before their message."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from services.common.storage.s3_archive import is_archived
from tests.integration.augmenter.conftest import MakeQueue, RunAugmenter, RunningStub, sqs_run_args
from tests.support.augmenter_process import augmenter_process, read_summary
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_model
from tests.support.postings import make_posting
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket
from tests.support.s3_server import S3Server
from tests.support.sqs_server import SqsServer, object_created_event
from tests.support.tcp_relay import error_response, tcp_relay


@pytest.fixture
def cold(sqs: SqsServer, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket whose server refuses to read what is in cold storage."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return Bucket(
        S3Server(sqs.endpoint_url, s3.environment), f"cold-{random.SystemRandom().randrange(2**40):x}"
    )


def _args(bucket: Bucket, target: str) -> list[str]:
    return [
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--endpoint-url",
        bucket.endpoint_url,
        "--target",
        target,
    ]


def _outputs(bucket: Bucket) -> list[str]:
    return [key for key in bucket.list_keys() if key.startswith("mod/")]


def test_objects_in_cold_storage_are_skipped(
    augment: RunAugmenter, stub: RunningStub, cold: Bucket, tmp_path: Path
) -> None:
    """They are counted and end the run with 3, whatever else is tolerated; a restored one is done."""
    for name, storage_class in (
        ("1", "STANDARD"),
        ("2", "GLACIER"),
        ("3", "DEEP_ARCHIVE"),
        ("4", "GLACIER_IR"),
        ("5", "GLACIER"),
    ):
        cold.put(f"raw/{name}.jsonl", make_posting(), StorageClass=storage_class)
    cold.restore_object("raw/5.jsonl")
    args = [*_args(cold, stub.target), "--ok-rejects", "--summary-json", tmp_path / "s.json"]
    ended = augment(*args)
    assert (ended.exit_code, _outputs(cold)) == (3, ["mod/1.jsonl", "mod/4.jsonl", "mod/5.jsonl"])
    assert [line.count("raw/2.jsonl: in cold storage") for line in ended.stderr.splitlines()] == [1]
    assert "3 done, 2 skipped, 0 failed" in ended.stdout
    assert "2 objects in cold storage were skipped" in ended.stdout
    assert read_summary(tmp_path / "s.json")["archived"] == 2
    ended = augment(*args[:-2], "--dry-run")
    assert (ended.exit_code, "3 already done" in ended.stdout) == (0, True)
    assert "2 objects in cold storage were skipped" in ended.stdout
    for name in "23":
        cold.restore_object(f"raw/{name}.jsonl")
    ended = augment(*args)
    assert (ended.exit_code, "2 done, 3 skipped" in ended.stdout) == (0, True)


_INVALID_STATE = error_response(403, "InvalidObjectState")


def test_archive_tier_that_only_reading_shows(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """A listing does not tell the tiers of INTELLIGENT_TIERING apart; such an object is skipped, too."""
    bucket.put("raw/1.jsonl", make_posting(), StorageClass="INTELLIGENT_TIERING")
    read = f"GET /{bucket.name}/raw/1.jsonl".encode()
    with tcp_relay(
        bucket.endpoint_url, reject=lambda data: _INVALID_STATE if data.startswith(read) else None
    ) as way:
        args = [*_args(bucket, stub.target), "--endpoint-url", way.url]
        ended = augment(*args)
    assert (ended.exit_code, _outputs(bucket)) == (3, [])
    assert "0 done, 1 skipped, 0 failed" in ended.stdout


def test_object_that_is_done_may_go_to_cold_storage(
    augment: RunAugmenter, stub: RunningStub, cold: Bucket
) -> None:
    """Its output is there, so it does not have to be read any more."""
    cold.put("raw/1.jsonl", make_posting(), StorageClass="GLACIER")
    cold.restore_object("raw/1.jsonl")
    assert augment(*_args(cold, stub.target)).exit_code == 0
    cold.put("raw/1.jsonl", make_posting(), StorageClass="GLACIER")  # as before, and not restored
    ended = augment(*_args(cold, stub.target))
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert augment(*_args(cold, stub.target), "--overwrite").exit_code == 3


@pytest.mark.slow
def test_restore_event_starts_the_file(
    augment: RunAugmenter, stub: RunningStub, cold: Bucket, make_queue: MakeQueue
) -> None:
    """The message about an object that was put into cold storage is deleted; the restore brings another."""
    queue = make_queue()
    cold.put("raw/1.jsonl", make_posting(), StorageClass="DEEP_ARCHIVE")
    queue.send(object_created_event(cold.name, "raw/1.jsonl"))
    ended = augment(*sqs_run_args(cold, queue, stub.target))
    assert (ended.exit_code, _outputs(cold), queue.count()) == (3, [], 0)
    cold.restore_object("raw/1.jsonl")
    restored = json.dumps(object_created_event(cold.name, "raw/1.jsonl"))
    queue.send(restored.replace("ObjectCreated:Put", "ObjectRestore:Completed"))
    ended = augment(*sqs_run_args(cold, queue, stub.target))
    assert (ended.exit_code, _outputs(cold), queue.count()) == (0, ["mod/1.jsonl"], 0)


@pytest.mark.slow
def test_watch_notices_a_restore(stub: RunningStub, cold: Bucket) -> None:
    """Although the object's ETag and time of modification stay the same."""
    cold.put("raw/1.jsonl", make_posting(), StorageClass="GLACIER")
    args = [*_args(cold, stub.target), "--watch", "--poll-interval", "100ms"]
    with augmenter_process(*args, env=dict(os.environ)) as process:
        assert process.stderr
        assert "in cold storage" in process.stderr.readline()
        cold.restore_object("raw/1.jsonl")
        wait_for(lambda: _outputs(cold) == ["mod/1.jsonl"], description="the restored file is done")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "1 done, 1 skipped" in out


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code", "left"), [("fail", 1, 1), ("skip", 0, 0)])
def test_object_gone_before_its_message(
    augment: RunAugmenter,
    stub: RunningStub,
    bucket: Bucket,
    make_queue: MakeQueue,
    how: str,
    code: int,
    left: int,
) -> None:
    """`--missing-input` decides whether it is a failed file or a message without work."""
    queue = make_queue()
    bucket.put("raw/1.jsonl", make_posting())
    queue.send(object_created_event(bucket.name, "raw/gone.jsonl"))
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    ended = augment(*sqs_run_args(bucket, queue, stub.target), "--missing-input", how)
    assert (ended.exit_code, queue.count()) == (code, left)
    assert "1 done" in ended.stdout
    assert ("1 objects were gone" in ended.stdout) == (how == "skip")


@pytest.mark.slow
def test_no_bucket_is_no_missing_object(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """A wrong endpoint must not delete the messages of all files: it ends the run in one line."""
    queue = make_queue()
    queue.send(object_created_event("no-such-bucket", "raw/1.jsonl"))
    args = sqs_run_args(bucket, queue, stub.target)[2:]
    places = ("s3://no-such-bucket/raw/", f"s3://{bucket.name}/mod/")
    ended = augment(*places, *args, "--missing-input", "skip")
    assert (ended.exit_code, queue.count()) == (1, 1)
    assert ended.stderr == "augmenter: s3://no-such-bucket/raw/: the bucket does not exist\n"


@pytest.mark.slow
def test_bucket_that_goes_in_the_middle_of_a_run_is_no_missing_object(
    stub: RunningStub, bucket: Bucket, cold: Bucket, make_queue: MakeQueue, tmp_path: Path
) -> None:
    """Its messages stay in the queue; a HEAD alone answers the same for either."""
    queue = make_queue(visible_seconds=600)
    places = (f"s3://{cold.name}/raw/", str(tmp_path / "out"), *sqs_run_args(cold, queue, stub.target)[2:])
    args = [*places, "--missing-input", "skip", "--watch"]
    queue.send(object_created_event(cold.name, "raw/never.jsonl"))
    with augmenter_process(*args, env=dict(os.environ)) as process:
        wait_for(lambda: queue.count() == 0, description="the missing object's message is deleted")
        cold.delete_bucket()
        queue.send(object_created_event(cold.name, "raw/1.jsonl"))
        wait_for(
            lambda: queue.count() == 1 and not queue.visible_count, description="the message is received"
        )
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, queue.count()) == (0, 1)
    assert "raw/1.jsonl: the bucket does not exist" in err
    assert "1 skipped, 1 failed" in out


@pytest.mark.parametrize("how", ["fail", "skip"])
def test_object_gone_after_it_was_listed(augment: RunAugmenter, bucket: Bucket, how: str) -> None:
    """The same holds without a queue."""
    bucket.put("raw/1.jsonl", make_posting())
    bucket.put("raw/2.jsonl", make_posting())

    def behave(call: ReceivedCall) -> Answers:
        bucket.delete_object("raw/2.jsonl")
        return answer_all(call)

    with scripted_model(behave) as model:
        ended = augment(*_args(bucket, model.target), "--concurrency", "1", "--missing-input", how)
    assert (ended.exit_code, _outputs(bucket)) == (0 if how == "skip" else 1, ["mod/1.jsonl"])


@pytest.mark.parametrize(
    ("answer", "archived"),
    [
        ({}, False),
        ({"StorageClass": "STANDARD_IA"}, False),
        ({"StorageClass": "GLACIER_IR"}, False),
        ({"StorageClass": "GLACIER"}, True),
        ({"StorageClass": "DEEP_ARCHIVE", "Restore": 'ongoing-request="true"'}, True),
        ({"StorageClass": "GLACIER", "Restore": 'ongoing-request="false", expiry-date="Fri"'}, False),
        ({"StorageClass": "GLACIER", "RestoreStatus": {"IsRestoreInProgress": True}}, True),
        ({"StorageClass": "GLACIER", "RestoreStatus": {"RestoreExpiryDate": "2026-12-02"}}, False),
        ({"StorageClass": "INTELLIGENT_TIERING"}, False),
        ({"StorageClass": "INTELLIGENT_TIERING", "ArchiveStatus": "ARCHIVE_ACCESS"}, True),
    ],
)
def test_archived_objects_are_told_from_the_others(answer: dict[str, object], archived: bool) -> None:
    """By what a listing or a HEAD says."""
    assert is_archived(answer) == archived
