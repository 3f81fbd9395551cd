"""What killed runs left of uploads: ended when it is old by the server's clock, and nobody adds to it."""

import datetime as dt
import logging
from collections.abc import AsyncIterator
from email.utils import format_datetime
from typing import Any

import pytest

from services.common.storage import s3_stale_uploads
from services.common.storage.protocol import FileInfo
from services.common.storage.s3 import S3Store
from services.common.storage.s3_client import aws_client
from tests.support.s3_bucket import Bucket
from tests.support.tcp_relay import deny_upload_listings, tcp_relay

pytestmark = pytest.mark.slow

_KEYS = ["p/_rejects/a.jsonl.gz", "p/a.jsonl"]
_OF_OTHERS = ["elsewhere/a.jsonl", "p/notes.txt"]
_LATER = dt.timedelta(hours=7)
_LARGE = FileInfo("large.jsonl", 1, '"its-etag"', 0)


@pytest.fixture
async def client(bucket: Bucket) -> AsyncIterator[Any]:
    """A client of the bucket, in which a run left uploads of one part, and others theirs."""
    async with aws_client("s3", endpoint_url=bucket.endpoint_url, max_connections=4) as client:
        for key in _KEYS + _OF_OTHERS:
            made = await client.create_multipart_upload(Bucket=bucket.name, Key=key)
            part = {"Bucket": bucket.name, "Key": key, "UploadId": made["UploadId"], "PartNumber": 1}
            await client.upload_part(**part, Body=b"x")
        yield client


async def _remaining_uploads(client: Any, bucket: Bucket) -> list[str]:
    page = await client.list_multipart_uploads(Bucket=bucket.name)
    return sorted(upload["Key"] for upload in page.get("Uploads", ()))


def _server_is_later(parsed: Any, **_: object) -> None:
    """As the server would say it hours after."""
    parsed["ResponseMetadata"]["HTTPHeaders"]["date"] = format_datetime(dt.datetime.now(dt.UTC) + _LATER)


def _started_earlier(parsed: Any, **_: object) -> None:
    for upload in parsed.get("Uploads", ()):
        upload["Initiated"] -= _LATER


def _without_date(parsed: Any, **_: object) -> None:
    del parsed["ResponseMetadata"]["HTTPHeaders"]["date"]


async def test_a_killed_runs_uploads_are_ended_when_they_are_old(client: Any, bucket: Bucket) -> None:
    """The next run leaves them; one that comes hours later by the server's clock ends them, not others'."""
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _OF_OTHERS)
    client.meta.events.register("after-call.s3.ListMultipartUploads", _server_is_later)
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == _OF_OTHERS


async def test_an_upload_that_still_grows_is_somebodys(client: Any, bucket: Bucket) -> None:
    """Begun hours ago, its last part just now: another process is at work on it."""
    client.meta.events.register("after-call.s3.ListMultipartUploads", _started_earlier)
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _OF_OTHERS)


async def test_a_run_that_goes_on_ends_them_too(
    client: Any, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a start: with the next large file, once the last look is some while ago."""
    store = S3Store(client, bucket=bucket.name, prefix="p/")
    await store.check_writable()
    client.meta.events.register("after-call.s3.ListMultipartUploads", _server_is_later)
    await _write_large(store)
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _OF_OTHERS)
    monkeypatch.setattr(s3_stale_uploads, "_CHECK_INTERVAL_SECONDS", 0)
    await _write_large(store)
    assert await _remaining_uploads(client, bucket) == _OF_OTHERS


async def _write_large(store: S3Store) -> None:
    async with store.create(_LARGE.name, _LARGE) as upload:
        await upload.write(bytes(6 * 2**20))
        await upload.complete()


async def test_a_server_that_does_not_list_them_is_told_of_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where uploads may not be listed, large files are made all the same: one warning a store."""
    monkeypatch.setattr(s3_stale_uploads, "_CHECK_INTERVAL_SECONDS", 0)
    with tcp_relay(bucket.endpoint_url, reject=deny_upload_listings) as way:
        async with aws_client("s3", endpoint_url=way.url, max_connections=4) as client:
            store = S3Store(client, bucket=bucket.name, prefix="p/")
            await store.check_writable()
            for _ in range(2):
                await _write_large(store)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [f"s3://{bucket.name}/p/: unfinished uploads are left as they are: Access Denied."]


async def test_a_server_without_a_clock_keeps_them(
    client: Any, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody's age can be told then: they are left, and the run says so."""
    client.meta.events.register("after-call.s3.ListMultipartUploads", _without_date)
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _OF_OTHERS)
    assert "does not tell the time" in caplog.text
