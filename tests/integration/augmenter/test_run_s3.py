"""Tests of `augmenter run` and of uploads and downloads on a real S3 server."""

import asyncio
import gzip
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from services.common.storage.errors import (
    AlreadyDoneError,
    InputChangedError,
    OutputConflictError,
    StorageError,
)
from services.common.storage.protocol import ABSENT, FileInfo
from services.common.storage.s3 import S3Store
from services.common.storage.s3_client import aws_client
from services.model_stub.levels import infer_level
from tests.integration.augmenter.conftest import RunAugmenter, RunningStub
from tests.support.postings import make_posting
from tests.support.s3_bucket import Bucket
from tests.support.tcp_relay import SLOW_DOWN_RESPONSE, reject_conditional_writes, tcp_relay

_SOURCE = FileInfo("a.jsonl", 1, '"its-etag"', 0)


def _expected(lines: list[bytes]) -> bytes:
    return b"".join(line[:-1] + b', "seniority": %d}\n' % infer_level("Acme", "Clerk") for line in lines)


def test_prefix_is_augmented_into_another_prefix(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """Outputs keep their names, have their input's ETag as metadata, and are skipped by the next run.

    Rejects are written beside the outputs.
    """
    lines = [make_posting(id=i) for i in range(100)]
    plain = bucket.put("raw/1.jsonl", b"\n".join(lines))
    compressed = bucket.put("raw/deep/2.jsonl.gz", gzip.compress(b"bad\n" + b"\n".join(lines)))
    bucket.put("raw/readme.txt", b"not ours")
    bucket.put("raw-not/3.jsonl", b"not ours")
    uri = f"s3://{bucket.name}"
    args = (f"{uri}/raw/", f"{uri}/mod", "--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    result = augment(*args)
    assert (result.exit_code, result.stderr) == (3, "")
    assert "200 augmented + 1 rejected" in result.stdout
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == [
        "mod/1.jsonl",
        "mod/_rejects/deep/2.jsonl.gz",
        "mod/_rejects/deep/2.jsonl.gz.reasons.jsonl",
        "mod/deep/2.jsonl.gz",
    ]
    assert bucket.get("mod/1.jsonl") == _expected(lines)
    assert gzip.decompress(bucket.get("mod/deep/2.jsonl.gz")) == _expected(lines)
    assert gzip.decompress(bucket.get("mod/_rejects/deep/2.jsonl.gz")) == b"bad\n"
    assert (bucket.input_etag("mod/1.jsonl"), bucket.input_etag("mod/deep/2.jsonl.gz")) == (plain, compressed)
    assert "0 done, 2 skipped" in augment(*args).stdout
    bucket.put("raw/deep/2.jsonl.gz", gzip.compress(lines[0]))
    result = augment(*args)
    assert (result.exit_code, "1 done, 1 skipped" in result.stdout) == (0, True)
    assert not [key for key in bucket.list_keys() if "_rejects" in key]


def test_input_and_output_may_be_bucket_and_folder(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """INPUT and OUTPUT may be bucket and folder in both directions, and finished files are skipped."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    upload_args = (tmp_path / "a.jsonl", f"s3://{bucket.name}/up/b.jsonl", *common)
    assert augment(*upload_args).exit_code == 0
    assert bucket.get("up/b.jsonl") == _expected([make_posting()])
    assert "1 skipped" in augment(*upload_args).stdout
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert "1 done" in augment(*upload_args).stdout
    download_args = (f"s3://{bucket.name}/up/", tmp_path / "down", *common)
    assert augment(*download_args).exit_code == 0
    assert (tmp_path / "down" / "b.jsonl").read_bytes() == _expected([make_posting()])
    assert "1 skipped" in augment(*download_args).stdout


_ODD_NAMES = (
    " a .jsonl",
    "a%2Fb.jsonl",
    "a%.jsonl",
    "a+b c.jsonl",
    "q'\"uote.jsonl",
    "<&amp;>.jsonl",
    "=?&#;,:@$!*().jsonl",
    "a/%20/+/é.jsonl",
    "e\u0301.jsonl",
    "[x]{y}^`|~.jsonl",
    "tab\t.jsonl",
    "\U0001f600.jsonl",
)


@pytest.mark.slow
def test_names_with_special_characters_are_kept(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket
) -> None:
    """Names with characters that URLs, XML or shells treat specially are kept in the output."""
    for name in _ODD_NAMES:
        bucket.put(f"raw/{name}", make_posting())
    args = (
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert f"{len(_ODD_NAMES)} done, 0 skipped" in augment(*args).stdout
    assert {key for key in bucket.list_keys() if key.startswith("mod/")} == {
        f"mod/{name}" for name in _ODD_NAMES
    }
    assert f"0 done, {len(_ODD_NAMES)} skipped" in augment(*args).stdout


@pytest.mark.slow
def test_large_object_is_uploaded_in_parts(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """An output larger than a part is stored whole, with its input's ETag as metadata."""
    lines = [make_posting(id=i, text="x" * 1_000) for i in range(20_000)]
    etag = bucket.put("raw/big.jsonl", b"\n".join(lines))
    result = augment(
        f"s3://{bucket.name}/raw/big.jsonl",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert result.exit_code == 0
    assert bucket.get("mod/big.jsonl") == _expected(lines)
    assert bucket.input_etag("mod/big.jsonl") == etag


@pytest.mark.slow
def test_failed_file_leaves_no_object(augment: RunAugmenter, stub: RunningStub, bucket: Bucket) -> None:
    """A file that fails after its first parts leaves neither an object nor parts."""
    lines = b"\n".join(make_posting(id=i, text="x" * 1_000) for i in range(20_000))
    bucket.put("raw/cut.jsonl.gz", gzip.compress(lines, 1)[:-9])
    noise = b"\n".join(make_posting(id=i, text=random.Random(i).randbytes(600).hex()) for i in range(20_000))
    bucket.put("raw/noise.jsonl.gz", gzip.compress(noise, 1)[:-9])
    result = augment(
        f"s3://{bucket.name}/raw/",
        f"s3://{bucket.name}/mod/",
        "--target",
        stub.target,
        "--endpoint-url",
        bucket.endpoint_url,
    )
    assert result.exit_code == 1
    assert sorted(result.stderr.splitlines()) == [
        f"augmenter: s3://{bucket.name}/raw/{name}.jsonl.gz: the compressed input is cut short"
        for name in ("cut", "noise")
    ]
    assert [key for key in bucket.list_keys() if key.startswith("mod")] == []
    assert bucket.count_unfinished_uploads() == 0


def test_missing_bucket_or_key_is_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path
) -> None:
    """A missing bucket or key ends the run with exit code 1 and one line that names it."""
    (tmp_path / "a.jsonl").write_bytes(make_posting())
    common = ("--target", stub.target, "--endpoint-url", bucket.endpoint_url)
    for source, sink, message in (
        ("s3://no-such-bucket/raw/", tmp_path / "out", "s3://no-such-bucket/raw/: the bucket does not exist"),
        (tmp_path / "a.jsonl", "s3://no-such-bucket/", "s3://no-such-bucket/: the bucket does not exist"),
        (f"s3://{bucket.name}/no.jsonl", f"{tmp_path}/x/", f"s3://{bucket.name}/no.jsonl: does not exist"),
    ):
        result = augment(source, sink, *common)
        assert (result.exit_code, result.stderr) == (1, f"augmenter: {message}\n")


def test_wrong_or_no_credentials_are_one_line(
    augment: RunAugmenter, stub: RunningStub, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong or missing credentials end the run with exit code 1 and one line that names the bucket."""
    args = (f"s3://{bucket.name}/raw/", tmp_path / "out", "--target", stub.target)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith(f"augmenter: s3://{bucket.name}/raw/: ")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    result = augment(*args, "--endpoint-url", bucket.endpoint_url)
    assert result.exit_code == 1
    assert result.stderr == f"augmenter: s3://{bucket.name}/raw/: Unable to locate credentials\n"


@pytest.fixture
async def store(bucket: Bucket) -> AsyncIterator[S3Store]:
    """Open a prefix of the bucket as storage."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, max_connections=4) as client:
        yield S3Store(client, bucket=bucket.name, prefix="p/")


@pytest.mark.slow
async def test_aborted_upload_leaves_nothing(store: S3Store) -> None:
    """An upload that is aborted while its parts are being sent stores nothing."""

    async def abort() -> None:
        async with store.create("big.jsonl", _SOURCE) as upload:
            await upload.write(bytes(20 * 2**20))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await abort()
    with pytest.raises(StorageError, match="does not exist"):
        await store.get_info("big.jsonl")


async def test_object_that_changed_after_its_listing_is_an_error(store: S3Store) -> None:
    """An object that changed after its listing is not read, so that an output never mixes two versions."""

    async def write(text: bytes) -> None:
        async with store.create("a.jsonl", _SOURCE) as upload:
            await upload.write(text)
            await upload.complete()

    await write(b"first")
    listed = await store.get_info("a.jsonl")
    assert [data async for data in store.read(listed)] == [b"first"]
    await write(b"second")
    with pytest.raises(InputChangedError):
        [data async for data in store.read(listed)]


async def test_changed_object_is_detected_if_the_server_ignores_conditions(bucket: Bucket) -> None:
    """If the server ignores the condition of a read, the ETag of its response shows the change."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, max_connections=2) as client:
        store = S3Store(client, bucket=bucket.name, prefix="p/")
        await _write_output(store, b"first")
        listed = await store.get_info("a.jsonl")
        await _write_output(store, b"other")
        client.meta.events.register("before-call.s3.GetObject", _without_condition)
        with pytest.raises(InputChangedError):
            [data async for data in store.read(listed)]


def _without_condition(params: dict[str, Any], **_: object) -> None:
    del params["headers"]["If-Match"]


@pytest.mark.slow
async def test_broken_download_is_resumed(store: S3Store, bucket: Bucket) -> None:
    """A download that breaks several times is resumed each time, and every byte arrives once."""
    data = random.Random(1).randbytes(5 * 2**20)
    await _write_output(store, data)

    def plan(number: int) -> int | None:
        return 2**20 + 300_000 if number < 3 else None

    with tcp_relay(bucket.endpoint_url, plan) as relay:
        async with aws_client("s3", endpoint_url=relay.url, max_connections=4) as client:
            unreliable = S3Store(client, bucket=bucket.name, prefix="p/")
            file = await store.get_info("a.jsonl")
            assert b"".join([chunk async for chunk in unreliable.read(file)]) == data
    assert relay.connection_count >= 4


@pytest.mark.slow
async def test_throttled_request_is_retried(store: S3Store, bucket: Bucket) -> None:
    """A response of 503 Slow Down is retried and fails no file."""
    await _write_output(store, b"text")
    with tcp_relay(bucket.endpoint_url, lambda number: SLOW_DOWN_RESPONSE if number < 2 else None) as relay:
        async with aws_client("s3", endpoint_url=relay.url, max_connections=1) as client:
            throttled = S3Store(client, bucket=bucket.name, prefix="p/")
            assert (await throttled.get_info("a.jsonl")).size_bytes == 4
    assert relay.connection_count >= 3


@pytest.mark.slow
async def test_throttled_concurrent_requests_all_succeed(store: S3Store, bucket: Bucket) -> None:
    """Many concurrent requests that are throttled for some seconds all succeed in the end."""
    await _write_output(store, b"text")
    until = time.monotonic() + 3
    with tcp_relay(
        bucket.endpoint_url, lambda _: SLOW_DOWN_RESPONSE if time.monotonic() < until else None
    ) as relay:
        async with aws_client("s3", endpoint_url=relay.url, max_connections=32) as client:
            throttled = S3Store(client, bucket=bucket.name, prefix="p/")
            found = await asyncio.gather(*(throttled.get_info("a.jsonl") for _ in range(64)))
    assert [file.size_bytes for file in found] == [4] * 64
    # More attempts than a shared retry quota would have allowed.
    assert relay.connection_count > 64 + 500 // 5


async def _write_output(
    store: S3Store, text: bytes, expected_version: str | None = None, input_file: FileInfo = _SOURCE
) -> str:
    async with store.create(input_file.name, input_file, expected_version=expected_version) as upload:
        await upload.write(text)
        await upload.complete()
    return (await store.get_info(input_file.name)).version


@pytest.mark.parametrize("size", [10, pytest.param(20 * 2**20, marks=pytest.mark.slow)])
async def test_output_replaces_only_the_expected_version(store: S3Store, size: int) -> None:
    """The second of two writers of one input finds it done. A writer with another input has a conflict."""
    first = await _write_output(store, b"1" * size, expected_version=ABSENT)
    with pytest.raises(AlreadyDoneError):
        await _write_output(store, b"2" * size, expected_version=ABSENT)
    other = FileInfo("source.jsonl", 1, '"another-etag"', 0)
    async with store.create("a.jsonl", other, expected_version='"not-it"') as upload:
        await upload.write(b"3" * size)
        with pytest.raises(OutputConflictError):
            await upload.complete()
    assert (await store.get_info("a.jsonl")).version == first
    assert await _write_output(store, b"4" * size, expected_version=first) != first


@pytest.mark.slow
async def test_output_is_checked_first_without_conditional_writes(
    bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """Without conditional writes, each output is checked before it is replaced, after one warning."""
    with tcp_relay(bucket.endpoint_url, reject=reject_conditional_writes) as relay:
        async with aws_client("s3", endpoint_url=relay.url, max_connections=4) as client:
            storage = S3Store(client, bucket=bucket.name, prefix="p/")
            first = ABSENT
            files = (FileInfo(f"{i}.jsonl", 1, "v", 0) for i in range(4))
            await asyncio.gather(
                *(_write_output(storage, b"0", expected_version=ABSENT, input_file=file) for file in files)
            )
            for size in (10, 20 * 2**20):
                first = await _write_output(storage, b"1" * size, expected_version=first)
                with pytest.raises(AlreadyDoneError):
                    await _write_output(storage, b"2" * size, expected_version=ABSENT)
                with pytest.raises(OutputConflictError):
                    await _write_output(
                        storage,
                        b"3" * size,
                        expected_version="no",
                        input_file=FileInfo("a.jsonl", 1, "other", 0),
                    )
                assert (await storage.get_info("a.jsonl")).version == first
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == 1
    assert "no conditional writes" in messages[0]


@pytest.mark.slow
async def test_two_writers_of_a_large_file_do_not_abort_each_other(store: S3Store, bucket: Bucket) -> None:
    """Of two writers of a large file, the first to complete succeeds, and the other finds it done."""
    async with store.create("a.jsonl", _SOURCE, expected_version=ABSENT) as first:
        await first.write(bytes(20 * 2**20))
        version = await _write_output(store, b"2" * (20 * 2**20), expected_version=ABSENT)
        await first.write(bytes(20 * 2**20))
        with pytest.raises(AlreadyDoneError):
            await first.complete()
    assert (await store.get_info("a.jsonl")).version == version


@pytest.mark.slow
async def test_aborted_upload_of_another_process_is_a_conflict(store: S3Store, bucket: Bucket) -> None:
    """An upload that another process aborts fails with a conflict, and leaves no parts."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, max_connections=1) as client:
        async with store.create("a.jsonl", _SOURCE, expected_version=ABSENT) as upload:
            await upload.write(bytes(20 * 2**20))
            page = await client.list_multipart_uploads(Bucket=bucket.name)
            [started] = page["Uploads"]
            await client.abort_multipart_upload(
                Bucket=bucket.name, Key=started["Key"], UploadId=started["UploadId"]
            )
            with pytest.raises(OutputConflictError):
                await upload.complete()
        page = await client.list_multipart_uploads(Bucket=bucket.name)
    assert not page.get("Uploads")


async def test_listing_begins_after_a_name(store: S3Store) -> None:
    """A listing with a start name has only names after it."""
    for name in ("1.jsonl", "2.jsonl", "30.jsonl"):
        async with store.create(name, _SOURCE) as upload:
            await upload.write(b"{}")
            await upload.complete()
    assert [file.name async for file in store.list(after="2")] == ["2.jsonl", "30.jsonl"]
    assert [file.name async for file in store.list(after="2.jsonl")] == ["30.jsonl"]
