"""Tests of uploads to and downloads from a real S3 server."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from services.common.aws_client import open_client
from services.common.storage.errors import (
    AlreadyDoneError,
    InputChangedError,
    OutputConflictError,
    StorageError,
)
from services.common.storage.protocol import ABSENT, FileInfo
from services.common.storage.s3 import S3Store
from tests.support.s3_bucket import Bucket
from tests.support.tcp_relay import SLOW_DOWN_RESPONSE, reject_conditional_writes, tcp_relay

_SOURCE = FileInfo("a.jsonl", 1, '"its-etag"', 0)


@pytest.fixture
async def store(bucket: Bucket) -> AsyncIterator[S3Store]:
    """Open a prefix of the bucket as storage."""
    async with open_client("s3", endpoint_url=bucket.endpoint_url, max_connections=4) as client:
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
    async with open_client("s3", endpoint_url=bucket.endpoint_url, max_connections=2) as client:
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
        async with open_client("s3", endpoint_url=relay.url, max_connections=4) as client:
            unreliable = S3Store(client, bucket=bucket.name, prefix="p/")
            file = await store.get_info("a.jsonl")
            assert b"".join([chunk async for chunk in unreliable.read(file)]) == data
    assert relay.connection_count >= 4


@pytest.mark.slow
async def test_throttled_request_is_retried(store: S3Store, bucket: Bucket) -> None:
    """A response of 503 Slow Down is retried and fails no file."""
    await _write_output(store, b"text")
    with tcp_relay(bucket.endpoint_url, lambda number: SLOW_DOWN_RESPONSE if number < 2 else None) as relay:
        async with open_client("s3", endpoint_url=relay.url, max_connections=1) as client:
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
        async with open_client("s3", endpoint_url=relay.url, max_connections=32) as client:
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
        async with open_client("s3", endpoint_url=relay.url, max_connections=4) as client:
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
    async with open_client("s3", endpoint_url=bucket.endpoint_url, max_connections=1) as client:
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
