"""Tests of the queue's URL, and of a message whose lease is lost while its file is in progress."""

import time

import pytest

from tests.integration.augmenter.conftest import MakeQueue, RunAugmenter, RunningStub, sqs_run_args
from tests.support.model_server import Answers, ReceivedCall, answer_all, scripted_model
from tests.support.postings import make_posting
from tests.support.redis_server import wait_for
from tests.support.s3_bucket import Bucket
from tests.support.scripted_sqs import scripted_sqs
from tests.support.sqs_server import object_created_event


@pytest.mark.parametrize(
    "text",
    [
        "postings",
        "arn:aws:sqs:us-east-1:123456789012:postings",
        "s3://bucket/postings",
        "https://[bad/123456789012/postings",
        "https://sqs.us-east-1.amazonaws.com",
        "https://sqs.us-east-1.amazonaws.com/",
        "https:///123456789012/postings",
        "https://sqs.us-east-1.amazonaws.com/1/a b",
        "https://sqs.us-east-1.amazonaws.com/1/q\n",
    ],
)
def test_invalid_queue_url_is_a_usage_error(augment: RunAugmenter, text: str) -> None:
    """A value of --sqs-queue-url that is not a URL, such as a queue's name or ARN, is a usage error."""
    result = augment("s3://b/raw/", "s3://b/mod/", "--target", "127.0.0.1:1", "--sqs-queue-url", text)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "not the URL of a queue" in result.stderr


@pytest.mark.slow
def test_queue_in_another_region_is_found(
    augment: RunAugmenter,
    stub: RunningStub,
    bucket: Bucket,
    make_queue: MakeQueue,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The region of the queue is taken from its URL, not from the environment."""
    queue = make_queue(region="eu-west-3")
    bucket.put("raw/1.jsonl", make_posting())
    queue.send(object_created_event(bucket.name, "raw/1.jsonl"))
    queue.url = f"https://sqs.eu-west-3.amazonaws.com/123456789012/{queue.url.rpartition('/')[2]}"
    result = augment(*sqs_run_args(bucket, queue, stub.target))
    assert (result.exit_code, result.stderr) == (0, "")
    assert "1 done" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", ["ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue"])
def test_lost_lease_is_logged_once(
    augment: RunAugmenter, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """If the lease of a message is lost, one warning is logged, and its file is still done."""
    bucket.put("raw/1.jsonl", make_posting())
    failing = {"ChangeMessageVisibility": code, "DeleteMessage": code}
    with scripted_sqs(
        object_created_event(bucket.name, "raw/1.jsonl"), visible_seconds=1, failing=failing
    ) as sqs:

        def behave(call: ReceivedCall) -> Answers:
            wait_for(lambda: sqs.calls["ChangeMessageVisibility"], description="a renewal")
            # Long enough for four more extensions.
            time.sleep(1.5)
            return answer_all(call)

        monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", sqs.endpoint_url)
        with scripted_model(behave) as model:
            result = augment(
                f"s3://{bucket.name}/raw/",
                f"s3://{bucket.name}/mod/",
                "--target",
                model.target,
                "--endpoint-url",
                bucket.endpoint_url,
                "--sqs-queue-url",
                "https://sqs.us-east-1.amazonaws.com/1/q",
            )
    assert (result.exit_code, "1 done" in result.stdout) == (0, True)
    assert sqs.calls["ChangeMessageVisibility"] == 1
    assert [line.count("is not renewed any more") for line in result.stderr.splitlines()] == [1]


@pytest.mark.slow
def test_queue_without_attributes_has_the_default_timeout(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the server has no queue attributes, the default visibility timeout of SQS is used."""
    bucket.put("raw/1.jsonl", make_posting())
    with scripted_sqs(
        object_created_event(bucket.name, "raw/1.jsonl"), visible_seconds=None, failing={}
    ) as sqs:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", sqs.endpoint_url)
        result = augment(
            f"s3://{bucket.name}/raw/",
            f"s3://{bucket.name}/mod/",
            "--target",
            stub.target,
            "--endpoint-url",
            bucket.endpoint_url,
            "--sqs-queue-url",
            f"{sqs.endpoint_url}/1/q",
        )
    assert (result.exit_code, result.stderr, sqs.calls["DeleteMessage"]) == (0, "", 1)
