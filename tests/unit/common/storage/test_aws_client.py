"""The settings of S3 clients, by where they go."""

import os

import pytest

from services.common.aws_client import declares_checksums, open_client


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)


@pytest.mark.parametrize(
    ("endpoint_url", "is_aws"),
    [
        (None, True),
        ("https://s3.eu-west-1.amazonaws.com", True),
        ("https://bucket.vpce-1a2b-3c4d.s3.us-east-1.vpce.amazonaws.com", True),
        ("https://s3.cn-north-1.amazonaws.com.cn", True),
        ("https://s3.dualstack.eusc-de-east-1.api.amazonwebservices.eu", True),
        ("https://s3.us-iso-east-1.c2s.ic.gov", True),
        ("https://storage.googleapis.com", False),
        ("https://amazonaws.com.example.org", False),
        ("https://notamazonaws.com", False),
        ("http://127.0.0.1:9000", False),
        ("http://minio:9000", False),
    ],
)
async def test_checksums_are_sent_to_aws_only(endpoint_url: str | None, is_aws: bool) -> None:
    """Any other server may keep their framing as content, or refuse the header."""
    async with open_client("s3", endpoint_url=endpoint_url, max_connections=1) as client:
        assert declares_checksums(client) is is_aws


@pytest.mark.parametrize("value", ["when_supported", "when_required", "WHEN_SUPPORTED"])
@pytest.mark.parametrize("endpoint_url", [None, "http://minio:9000"])
async def test_environment_setting_of_checksums_is_kept(
    endpoint_url: str | None, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the client goes."""
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", value)
    async with open_client("s3", endpoint_url=endpoint_url, max_connections=1) as client:
        assert declares_checksums(client) is (value.lower() == "when_supported")
