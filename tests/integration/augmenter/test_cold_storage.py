"""Tests of objects that cannot be read: in cold storage, or deleted before they are processed."""

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
def cold_bucket(sqs: SqsServer, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Create a bucket on a server that rejects reads of objects in cold storage."""
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
    augment: RunAugmenter, stub: RunningStub, cold_bucket: Bucket, tmp_path: Path
) -> None:
    """Objects in cold storage are skipped and end the run with exit code 3. A restored one is processed."""
    for name, storage_class in (
        ("1", "STANDARD"),
        ("2", "GLACIER"),
        ("3", "DEEP_ARCHIVE"),
        ("4", "GLACIER_IR"),
        ("5", "GLACIER"),
    ):
        cold_bucket.put(f"raw/{name}.jsonl", make_posting(), StorageClass=storage_class)
    cold_bucket.restore_object("raw/5.jsonl")
    args = [*_args(cold_bucket, stub.target), "--ok-rejects", "--summary-json", tmp_path / "s.json"]
    result = augment(*args)
    assert (result.exit_code, _outputs(cold_bucket)) == (3, ["mod/1.jsonl", "mod/4.jsonl", "mod/5.jsonl"])
    assert [line.count("raw/2.jsonl: in cold storage") for line in result.stderr.splitlines()] == [1]
    assert "3 done, 2 skipped, 0 failed" in result.stdout
    assert "2 objects in cold storage were skipped" in result.stdout
    assert read_summary(tmp_path / "s.json")["archived"] == 2
    result = augment(*args[:-2], "--dry-run")
    assert (result.exit_code, "3 already done" in result.stdout) == (0, True)
    assert "2 objects in cold storage were skipped" in result.stdout
    for name in "23":
        cold_bucket.restore_object(f"raw/{name}.jsonl")
    result = augment(*args)
    assert (result.exit_code, "2 done, 3 skipped" in result.stdout) == (0, True)


_INVALID_STATE = error_response(403, "InvalidObjectState")


def test_object_in_an_archive_tier_is_skipped_when_its_read_fails(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """An archive tier of INTELLIGENT_TIERING is in no listing: the object is skipped when it is read."""
    bucket.put("raw/1.jsonl", make_posting(), StorageClass="INTELLIGENT_TIERING")
    read = f"GET /{bucket.name}/raw/1.jsonl".encode()
    with tcp_relay(
        bucket.endpoint_url, reject=lambda data: _INVALID_STATE if data.startswith(read) else None
    ) as relay:
        args = [*_args(bucket, stub.target), "--endpoint-url", relay.url]
        result = augment(*args)
    assert (result.exit_code, _outputs(bucket)) == (3, [])
    assert "0 done, 1 skipped, 0 failed" in result.stdout


def test_finished_object_in_cold_storage_is_not_read(
    augment: RunAugmenter, stub: RunningStub, cold_bucket: Bucket
) -> None:
    """An object whose output exists need not be read, so it may be in cold storage."""
    cold_bucket.put("raw/1.jsonl", make_posting(), StorageClass="GLACIER")
    cold_bucket.restore_object("raw/1.jsonl")
    assert augment(*_args(cold_bucket, stub.target)).exit_code == 0
    # The same object, but not restored.
    cold_bucket.put("raw/1.jsonl", make_posting(), StorageClass="GLACIER")
    result = augment(*_args(cold_bucket, stub.target))
    assert (result.exit_code, result.stderr) == (0, "")
    assert augment(*_args(cold_bucket, stub.target), "--overwrite").exit_code == 3


@pytest.mark.slow
def test_restore_event_leads_to_processing(
    augment: RunAugmenter, stub: RunningStub, cold_bucket: Bucket, make_queue: MakeQueue
) -> None:
    """The message of an object in cold storage is deleted. That of its restore leads to its processing."""
    queue = make_queue()
    cold_bucket.put("raw/1.jsonl", make_posting(), StorageClass="DEEP_ARCHIVE")
    queue.send(object_created_event(cold_bucket.name, "raw/1.jsonl"))
    result = augment(*sqs_run_args(cold_bucket, queue, stub.target))
    assert (result.exit_code, _outputs(cold_bucket), queue.count()) == (3, [], 0)
    cold_bucket.restore_object("raw/1.jsonl")
    restored = json.dumps(object_created_event(cold_bucket.name, "raw/1.jsonl"))
    queue.send(restored.replace("ObjectCreated:Put", "ObjectRestore:Completed"))
    result = augment(*sqs_run_args(cold_bucket, queue, stub.target))
    assert (result.exit_code, _outputs(cold_bucket), queue.count()) == (0, ["mod/1.jsonl"], 0)


@pytest.mark.slow
def test_watch_processes_a_restored_object(stub: RunningStub, cold_bucket: Bucket) -> None:
    """`--watch` processes a restored object, although its ETag and modification time are the same."""
    cold_bucket.put("raw/1.jsonl", make_posting(), StorageClass="GLACIER")
    args = [*_args(cold_bucket, stub.target), "--watch", "--poll-interval", "100ms"]
    with augmenter_process(*args, env=dict(os.environ)) as process:
        assert process.stderr
        assert "in cold storage" in process.stderr.readline()
        cold_bucket.restore_object("raw/1.jsonl")
        wait_for(lambda: _outputs(cold_bucket) == ["mod/1.jsonl"], description="the restored file is done")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "1 done, 1 skipped" in out


@pytest.mark.slow
@pytest.mark.parametrize(("missing_input", "code", "remaining_messages"), [("fail", 1, 1), ("skip", 0, 0)])
def test_missing_object_of_a_message_is_failed_or_skipped(
    augment: RunAugmenter,
    stub: RunningStub,
    bucket: Bucket,
    make_queue: MakeQueue,
    missing_input: str,
    code: int,
    remaining_messages: int,
) -> None:
    """An object that is missing when its message is read is a failed file, or skipped if configured."""
    queue = make_queue()
    bucket.put("raw/1.jsonl", make_posting())
    queue.send(object_created_event(bucket.name, "raw/gone.jsonl"))
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    result = augment(*sqs_run_args(bucket, queue, stub.target), "--missing-input", missing_input)
    assert (result.exit_code, queue.count()) == (code, remaining_messages)
    assert "1 done" in result.stdout
    assert ("1 objects were gone" in result.stdout) == (missing_input == "skip")


@pytest.mark.slow
def test_missing_bucket_ends_the_run(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, make_queue: MakeQueue
) -> None:
    """A missing bucket ends the run, so that its messages are not deleted as those of missing objects."""
    queue = make_queue()
    queue.send(object_created_event("no-such-bucket", "raw/1.jsonl"))
    args = sqs_run_args(bucket, queue, stub.target)[2:]
    uris = ("s3://no-such-bucket/raw/", f"s3://{bucket.name}/mod/")
    result = augment(*uris, *args, "--missing-input", "skip")
    assert (result.exit_code, queue.count()) == (1, 1)
    assert result.stderr == "augmenter: s3://no-such-bucket/raw/: the bucket does not exist\n"


@pytest.mark.slow
def test_messages_stay_when_the_bucket_is_deleted(
    stub: RunningStub, bucket: Bucket, cold_bucket: Bucket, make_queue: MakeQueue, tmp_path: Path
) -> None:
    """If the bucket is deleted during a run, its messages stay, although a HEAD gives the same status."""
    queue = make_queue(visible_seconds=600)
    paths = (
        f"s3://{cold_bucket.name}/raw/",
        str(tmp_path / "out"),
        *sqs_run_args(cold_bucket, queue, stub.target)[2:],
    )
    args = [*paths, "--missing-input", "skip", "--watch"]
    queue.send(object_created_event(cold_bucket.name, "raw/never.jsonl"))
    with augmenter_process(*args, env=dict(os.environ)) as process:
        wait_for(lambda: queue.count() == 0, description="the missing object's message is deleted")
        cold_bucket.delete_bucket()
        queue.send(object_created_event(cold_bucket.name, "raw/1.jsonl"))
        wait_for(
            lambda: queue.count() == 1 and not queue.visible_count, description="the message is received"
        )
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, queue.count()) == (0, 1)
    assert "raw/1.jsonl: the bucket does not exist" in err
    assert "1 skipped, 1 failed" in out


@pytest.mark.parametrize("missing_input", ["fail", "skip"])
def test_object_deleted_after_its_listing_is_failed_or_skipped(
    augment: RunAugmenter, bucket: Bucket, missing_input: str
) -> None:
    """An object that is deleted after its listing is a failed file, or skipped if configured."""
    bucket.put("raw/1.jsonl", make_posting())
    bucket.put("raw/2.jsonl", make_posting())

    def behave(call: ReceivedCall) -> Answers:
        bucket.delete_object("raw/2.jsonl")
        return answer_all(call)

    with scripted_model(behave) as model:
        result = augment(*_args(bucket, model.target), "--concurrency", "1", "--missing-input", missing_input)
    assert (result.exit_code, _outputs(bucket)) == (0 if missing_input == "skip" else 1, ["mod/1.jsonl"])


@pytest.mark.parametrize(
    ("response", "archived"),
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
def test_archived_objects_are_recognised(response: dict[str, object], archived: bool) -> None:
    """Whether an object is archived follows from the fields of a listing or a HEAD."""
    assert is_archived(response) == archived
