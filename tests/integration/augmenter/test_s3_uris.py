"""Tests of access points, tenants and encryption keys in S3."""

import base64
import os
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from services.augmenter import paths
from services.augmenter.paths import S3Uri
from services.common.aws_client import open_client
from services.common.errors import UsageError
from services.common.storage.s3 import S3Store
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.postings import make_posting
from tests.support.s3_bucket import Bucket
from tests.support.tcp_relay import error_response, tcp_relay

_ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/postings"


def _create_key(folder: Path, name: str, *, encoded: bool) -> tuple[bytes, Path]:
    key = os.urandom(32)
    path = folder / name
    path.write_bytes(base64.b64encode(key) + b"\n" if encoded else key)
    path.chmod(0o600)
    return key, path


def _args(bucket: Bucket, target: str) -> list[str]:
    return [
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--endpoint-url",
        bucket.endpoint_url,
        "--target",
        target,
    ]


def test_input_and_output_have_their_own_sse_c_keys(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """INPUT is read with one SSE-C key, and OUTPUT and its rejects are written with another."""
    key, key_file = _create_key(tmp_path, "in.key", encoded=False)
    output_key, output_key_file = _create_key(tmp_path, "out.key", encoded=True)
    input_encryption = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}
    output_encryption = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": output_key}
    large = b"\n".join(make_posting(id=i, text="x" * 1_000) for i in range(6_000))
    bucket.put("raw/1.jsonl", make_posting() + b"\nbad", **input_encryption)
    bucket.put("raw/large.jsonl", large, **input_encryption)
    keys = ["--sse-c-key-file", str(key_file), "--output-sse-c-key-file", str(output_key_file)]
    result = augment(*_args(bucket, stub.target), *keys)
    assert (result.exit_code, result.stderr) == (3, "")
    assert bucket.get("mod/1.jsonl", **output_encryption).startswith(make_posting()[:-1])
    assert bucket.get("mod/large.jsonl", **output_encryption).count(b"\n") == 6_000
    assert bucket.get("mod/_rejects/1.jsonl", **output_encryption) == b"bad\n"
    with pytest.raises(ClientError):
        bucket.get("mod/1.jsonl")
    assert "0 done, 2 skipped" in augment(*_args(bucket, stub.target), *keys).stdout


@pytest.mark.parametrize("which", ["none", "other"])
def test_wrong_or_no_sse_c_key_fails_the_file_in_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path, which: str
) -> None:
    """A wrong or missing SSE-C key fails the file in one line, and no key is logged at any level."""
    key, _ = _create_key(tmp_path, "a.key", encoded=True)
    other, other_file = _create_key(tmp_path, "b.key", encoded=True)
    bucket.put("raw/1.jsonl", make_posting(), SSECustomerAlgorithm="AES256", SSECustomerKey=key)
    given = [] if which == "none" else ["--sse-c-key-file", str(other_file)]
    result = augment(*_args(bucket, stub.target), *given, "--log-level", "debug")
    assert (result.exit_code, "0 done, 0 skipped, 1 failed" in result.stdout) == (1, True)
    assert (
        sum("raw/1.jsonl" in line and "augmenter: s3://" in line for line in result.stderr.splitlines()) == 1
    )
    assert base64.b64encode(other).decode() not in result.stderr


def test_unusable_sse_c_keys_are_usage_errors(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """An invalid key file, an unencrypted connection, and a local path with a key are usage errors."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    (tmp_path / "short.key").write_bytes(b"secret")
    _, good = _create_key(tmp_path, "good.key", encoded=False)
    common = ("--target", stub.target)
    for name, message in (("short.key", "neither a key of 32 bytes"), ("no.key", "No such file")):
        result = augment(*_args(bucket, stub.target), "--sse-c-key-file", tmp_path / name)
        assert (result.exit_code, message in result.stderr, "secret" in result.stderr) == (2, True, False)
    remote = ("--endpoint-url", "http://s3.example.com", "--output-sse-c-key-file", good)
    result = augment(*_args(bucket, stub.target), *remote)
    assert result.exit_code == 2
    assert "s3.example.com would get the key in the clear" in result.stderr
    result = augment(tmp_path / "a.jsonl", f"s3://{bucket.name}/x/", *common, "--sse-c-key-file", good)
    assert (result.exit_code, "INPUT must be s3://" in result.stderr) == (2, True)
    result = augment(f"s3://{bucket.name}/x/", tmp_path / "o", *common, "--output-sse-c-key-file", good)
    assert (result.exit_code, "OUTPUT must be s3://" in result.stderr) == (2, True)


def test_sse_c_key_is_not_sent_through_an_http_proxy(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An SSE-C key is not sent through an HTTP proxy, which could read it. `no_proxy` is respected."""
    key, key_file = _create_key(tmp_path, "in.key", encoded=False)
    bucket.put("raw/1.jsonl", make_posting(), SSECustomerAlgorithm="AES256", SSECustomerKey=key)
    args = [*_args(bucket, stub.target), "--sse-c-key-file", str(key_file)]
    requests: list[bytes] = []

    def reject(data: bytes) -> bytes:
        requests.append(data)
        return error_response(502, "BadGateway")

    with tcp_relay(bucket.endpoint_url, reject=reject) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        result = augment(*args)
        assert (result.exit_code, len(result.stderr.splitlines()), requests) == (2, 1, [])
        assert "--sse-c-key-file: the HTTP proxy that the environment names" in result.stderr
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert (augment(*args).exit_code, requests) == (0, [])


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        (f"s3://{_ACCESS_POINT}/raw/", S3Uri(_ACCESS_POINT, "raw/"), None),
        (f"s3://{_ACCESS_POINT}/raw", S3Uri(_ACCESS_POINT, "raw/"), None),
        (f"s3://{_ACCESS_POINT}", S3Uri(_ACCESS_POINT, ""), None),
        (f"s3://{_ACCESS_POINT}/raw/1.jsonl", S3Uri(_ACCESS_POINT, "raw/"), "1.jsonl"),
        (
            f"s3://{_ACCESS_POINT.replace('/', ':')}/raw/",
            S3Uri(_ACCESS_POINT.replace("/", ":"), "raw/"),
            None,
        ),
        ("s3://acme:postings/raw/", S3Uri("acme:postings", "raw/"), None),
        ("s3://:postings/raw/", S3Uri(":postings", "raw/"), None),
    ],
)
def test_uri_may_name_an_access_point_or_a_tenant(text: str, source: S3Uri, name: str | None) -> None:
    """The bucket of an S3 URI may be an access point's ARN, or have a tenant."""
    run_paths = paths.resolve_paths(text, "/nowhere/" if name is None else "/nowhere/x.jsonl", None)
    assert (run_paths.source, run_paths.input_name) == (source, name)


@pytest.mark.parametrize(
    "text",
    [
        "s3://arn:aws:s3:::bucket/raw/",
        "s3://arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap/raw/",
        "s3://arn:aws:s3-object-lambda:eu-west-1:123456789012:accesspoint/lambda/raw/",
        "s3://arn:aws:s3-outposts:eu-west-1:123456789012:outpost/op-1/accesspoint/postings/raw/",
        "s3://arn:aws:s3:eu-west-1:12:accesspoint/postings/raw/",
        "s3://arn:nonsense/raw/",
        "s3://a:b:c/raw/",
        "s3://user:pass@host/raw/",
    ],
)
def test_unsupported_arn_or_bucket_is_a_usage_error(text: str) -> None:
    """An unsupported ARN or an invalid bucket is a usage error that lists what is supported."""
    with pytest.raises(UsageError, match=r"is not served|neither a bucket's name nor TENANT:BUCKET"):
        paths.resolve_paths(text, "/nowhere/", None)


@pytest.mark.parametrize("point", [_ACCESS_POINT, "postings-a1b2c3d4-s3alias"])
def test_queue_with_an_access_point_is_a_usage_error(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, point: str
) -> None:
    """--sqs-queue-url excludes an access point, since events name the bucket behind it."""
    queue = ("--sqs-queue-url", "https://sqs.eu-west-1.amazonaws.com/1/q")
    result = augment(f"s3://{point}/raw/", tmp_path / "out", "--target", stub.target, *queue)
    assert (result.exit_code, "not its access point" in result.stderr) == (2, True)


async def test_request_to_an_access_point_is_sent_to_its_host(bucket: Bucket) -> None:
    """A request to an access point is sent to its host, in the region of its ARN."""
    urls: list[str] = []

    class StopHereError(Exception):
        """Nothing is sent."""

    def stop(request: object, **_: object) -> None:
        urls.append(str(getattr(request, "url", "")))
        raise StopHereError

    async with open_client("s3", max_connections=1) as client:
        client.meta.events.register("before-send.s3", stop)
        with pytest.raises(StopHereError):
            await S3Store(client, bucket=_ACCESS_POINT, prefix="raw/").get_info("1.jsonl")
    host = "postings-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"
    assert urls == [f"https://{host}/raw/1.jsonl"]


_NO_BUCKET = error_response(404, "NoSuchBucket")


def test_tenant_is_sent_with_the_bucket(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """A tenant is sent in the path together with the bucket, as Ceph expects it."""
    paths: list[bytes] = []

    def respond(data: bytes) -> bytes:
        paths.append(data.split(b" ")[1].partition(b"?")[0])
        return _NO_BUCKET

    with tcp_relay(bucket.endpoint_url, reject=respond) as relay:
        args = ("s3://acme:postings/raw/", tmp_path / "out", "--target", stub.target)
        result = augment(*args, "--endpoint-url", relay.url)
    assert paths == [b"/acme%3Apostings"]
    assert (result.exit_code, result.stderr) == (
        1,
        "augmenter: s3://acme:postings/raw/: the bucket does not exist\n",
    )
