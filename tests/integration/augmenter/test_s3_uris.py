"""What `s3://` may also name, access points and tenants, and the keys of encrypted objects."""

import base64
import os
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from services.augmenter import paths
from services.augmenter.paths import S3Uri
from services.common.errors import UsageError
from services.common.storage.s3 import S3Store
from services.common.storage.s3_client import aws_client
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.postings import make_posting
from tests.support.s3_bucket import Bucket
from tests.support.tcp_relay import error_response, tcp_relay

_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/postings"


def _key(folder: Path, name: str, *, encoded: bool) -> tuple[bytes, Path]:
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
    """INPUT is read with one key, OUTPUT and its rejects are written with the other, in parts or not."""
    key, key_file = _key(tmp_path, "in.key", encoded=False)
    output_key, output_key_file = _key(tmp_path, "out.key", encoded=True)
    ours = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": key}
    theirs = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": output_key}
    large = b"\n".join(make_posting(id=i, text="x" * 1_000) for i in range(6_000))
    bucket.put("raw/1.jsonl", make_posting() + b"\nbad", **ours)
    bucket.put("raw/large.jsonl", large, **ours)
    keys = ["--sse-c-key-file", str(key_file), "--output-sse-c-key-file", str(output_key_file)]
    ended = augment(*_args(bucket, stub.target), *keys)
    assert (ended.exit_code, ended.stderr) == (3, "")
    assert bucket.get("mod/1.jsonl", **theirs).startswith(make_posting()[:-1])
    assert bucket.get("mod/large.jsonl", **theirs).count(b"\n") == 6_000
    assert bucket.get("mod/_rejects/1.jsonl", **theirs) == b"bad\n"
    with pytest.raises(ClientError):
        bucket.get("mod/1.jsonl")
    assert "0 done, 2 skipped" in augment(*_args(bucket, stub.target), *keys).stdout


@pytest.mark.parametrize("which", ["none", "other"])
def test_wrong_or_no_sse_c_key_fails_the_file_in_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path, which: str
) -> None:
    """The key is in no line, at whatever level."""
    key, _ = _key(tmp_path, "a.key", encoded=True)
    other, other_file = _key(tmp_path, "b.key", encoded=True)
    bucket.put("raw/1.jsonl", make_posting(), SSECustomerAlgorithm="AES256", SSECustomerKey=key)
    given = [] if which == "none" else ["--sse-c-key-file", str(other_file)]
    ended = augment(*_args(bucket, stub.target), *given, "--log-level", "debug")
    assert (ended.exit_code, "0 done, 0 skipped, 1 failed" in ended.stdout) == (1, True)
    assert (
        sum("raw/1.jsonl" in line and "augmenter: s3://" in line for line in ended.stderr.splitlines()) == 1
    )
    assert base64.b64encode(other).decode() not in ended.stderr


def test_unusable_sse_c_keys_are_usage_errors(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """A file that holds no key, a way that is not encrypted, and places that have no keys: exit code 2."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    (tmp_path / "short.key").write_bytes(b"secret")
    _, good = _key(tmp_path, "good.key", encoded=False)
    common = ("--target", stub.target)
    for name, told in (("short.key", "neither a key of 32 bytes"), ("no.key", "No such file")):
        ended = augment(*_args(bucket, stub.target), "--sse-c-key-file", tmp_path / name)
        assert (ended.exit_code, told in ended.stderr, "secret" in ended.stderr) == (2, True, False)
    away = ("--endpoint-url", "http://s3.example.com", "--output-sse-c-key-file", good)
    ended = augment(*_args(bucket, stub.target), *away)
    assert ended.exit_code == 2
    assert "s3.example.com would get the key in the clear" in ended.stderr
    ended = augment(tmp_path / "a.jsonl", f"s3://{bucket.name}/x/", *common, "--sse-c-key-file", good)
    assert (ended.exit_code, "INPUT must be s3://" in ended.stderr) == (2, True)
    ended = augment(f"s3://{bucket.name}/x/", tmp_path / "o", *common, "--output-sse-c-key-file", good)
    assert (ended.exit_code, "OUTPUT must be s3://" in ended.stderr) == (2, True)


def test_sse_c_key_is_not_sent_through_an_http_proxy(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without https a proxy reads it, also on the way to this machine; a target in `no_proxy` has none."""
    key, key_file = _key(tmp_path, "in.key", encoded=False)
    bucket.put("raw/1.jsonl", make_posting(), SSECustomerAlgorithm="AES256", SSECustomerKey=key)
    args = [*_args(bucket, stub.target), "--sse-c-key-file", str(key_file)]
    requests: list[bytes] = []

    def refuse(data: bytes) -> bytes:
        requests.append(data)
        return error_response(502, "BadGateway")

    with tcp_relay(bucket.endpoint_url, reject=refuse) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        ended = augment(*args)
        assert (ended.exit_code, len(ended.stderr.splitlines()), requests) == (2, 1, [])
        assert "--sse-c-key-file: the HTTP proxy that the environment names" in ended.stderr
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert (augment(*args).exit_code, requests) == (0, [])


@pytest.mark.parametrize(
    ("text", "source", "name"),
    [
        (f"s3://{_POINT}/raw/", S3Uri(_POINT, "raw/"), None),
        (f"s3://{_POINT}/raw", S3Uri(_POINT, "raw/"), None),
        (f"s3://{_POINT}", S3Uri(_POINT, ""), None),
        (f"s3://{_POINT}/raw/1.jsonl", S3Uri(_POINT, "raw/"), "1.jsonl"),
        (f"s3://{_POINT.replace('/', ':')}/raw/", S3Uri(_POINT.replace("/", ":"), "raw/"), None),
        ("s3://acme:postings/raw/", S3Uri("acme:postings", "raw/"), None),
        ("s3://:postings/raw/", S3Uri(":postings", "raw/"), None),
    ],
)
def test_place_may_be_an_access_point_or_have_a_tenant(text: str, source: S3Uri, name: str | None) -> None:
    """The prefix begins behind the access point's name."""
    plan = paths.resolve_paths(text, "/nowhere/" if name is None else "/nowhere/x.jsonl", None)
    assert (plan.source, plan.input_name) == (source, name)


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
def test_other_places_are_refused_in_one_line(text: str) -> None:
    """It names the place, and what is served."""
    with pytest.raises(UsageError, match=r"is not served|neither a bucket's name nor TENANT:BUCKET"):
        paths.resolve_paths(text, "/nowhere/", None)


@pytest.mark.parametrize("point", [_POINT, "postings-a1b2c3d4-s3alias"])
def test_queue_does_not_go_with_an_access_point(
    augment: RunAugmenter, stub: RunningStub, tmp_path: Path, point: str
) -> None:
    """The events name the bucket behind it, so none would be about INPUT."""
    queue = ("--sqs-queue-url", "https://sqs.eu-west-1.amazonaws.com/1/q")
    ended = augment(f"s3://{point}/raw/", tmp_path / "out", "--target", stub.target, *queue)
    assert (ended.exit_code, "not its access point" in ended.stderr) == (2, True)


async def test_access_point_is_asked_at_its_own_host(bucket: Bucket) -> None:
    """In the region that its ARN names; the server itself is AWS's only."""
    asked: list[str] = []

    class StopHereError(Exception):
        """Nothing is sent."""

    def stop(request: object, **_: object) -> None:
        asked.append(str(getattr(request, "url", "")))
        raise StopHereError

    async with aws_client("s3", max_connections=1) as client:
        client.meta.events.register("before-send.s3", stop)
        with pytest.raises(StopHereError):
            await S3Store(client, bucket=_POINT, prefix="raw/").get_info("1.jsonl")
    host = "postings-123456789012.s3-accesspoint.eu-west-1.amazonaws.com"
    assert asked == [f"https://{host}/raw/1.jsonl"]


_NO_BUCKET = error_response(404, "NoSuchBucket")


def test_tenant_is_sent_with_the_bucket(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """As Ceph wants it, the colon encoded in the path."""
    paths: list[bytes] = []

    def answer(data: bytes) -> bytes:
        paths.append(data.split(b" ")[1].partition(b"?")[0])
        return _NO_BUCKET

    with tcp_relay(bucket.endpoint_url, reject=answer) as way:
        args = ("s3://acme:postings/raw/", tmp_path / "out", "--target", stub.target)
        ended = augment(*args, "--endpoint-url", way.url)
    assert paths == [b"/acme%3Apostings"]
    assert (ended.exit_code, ended.stderr) == (
        1,
        "augmenter: s3://acme:postings/raw/: the bucket does not exist\n",
    )
