"""Tests of the region and endpoint in a queue's URL."""

import pytest

from services.augmenter.sources.queue_url import QueueEndpoint, queue_endpoint

_HOST = "vpce-0a1b-2c3d.sqs.us-east-1.vpce.amazonaws.com"


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove endpoints that the developer has configured from the environment."""
    for name in ("AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("host", "region", "is_endpoint"),
    [
        ("sqs.us-west-2.amazonaws.com", "us-west-2", False),
        ("sqs.ap-southeast-1.amazonaws.com", "ap-southeast-1", False),
        ("sqs.us-gov-west-1.amazonaws.com", "us-gov-west-1", False),
        ("sqs.cn-north-1.amazonaws.com.cn", "cn-north-1", False),
        ("SQS.eu-central-1.amazonaws.com:443", "eu-central-1", False),
        ("queue.amazonaws.com", "us-east-1", False),
        ("eu-west-3.queue.amazonaws.com", "eu-west-3", False),
        ("cn-northwest-1.queue.amazonaws.com.cn", "cn-northwest-1", False),
        ("sqs-fips.us-gov-east-1.amazonaws.com", "us-gov-east-1", True),
        ("sqs.eu-west-1.api.aws", "eu-west-1", True),
        ("sqs-fips.us-east-2.api.aws", "us-east-2", True),
        ("sqs.us-iso-east-1.c2s.ic.gov", "us-iso-east-1", True),
        (_HOST, "us-east-1", True),
        ("vpce-0a1b-2c3d-us-east-1a.sqs.us-east-1.vpce.amazonaws.com", "us-east-1", True),
        ("localhost:4566", None, False),
        ("sqs.eu-west-1.localhost.localstack.cloud:4566", "eu-west-1", False),
        ("eu-west-1.queue.localhost.localstack.cloud:4566", "eu-west-1", False),
        ("localhost:4566/queue/ap-southeast-2", "ap-southeast-2", False),
        ("elasticmq.internal:9324/queue", None, False),
        ("sqs.eu-west-1.amazonaws.com.example.org", None, False),
        ("elasticmq.internal:9324", None, False),
        ("", None, False),
    ],
)
def test_region_and_endpoint_are_those_of_the_url(host: str, region: str | None, is_endpoint: bool) -> None:
    """Region and endpoint are derived from any AWS host. Other hosts are left to the environment."""
    url = f"https://{host}/123456789012/postings"
    assert queue_endpoint(url) == QueueEndpoint(region, f"https://{host}" if is_endpoint else None)


def test_endpoint_of_the_environment_overrides_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the environment has an endpoint for SQS, only the region is taken from the queue's URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://127.0.0.1:9")
    assert queue_endpoint(f"https://{_HOST}/1/q") == QueueEndpoint("us-east-1")
