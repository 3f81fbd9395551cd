"""Tests of unfinished uploads that killed runs left: they are aborted once they are old and idle."""

import datetime as dt
import logging
from collections.abc import AsyncIterator
from email.utils import format_datetime
from typing import Any

import pytest

from services.common.aws_client import open_client
from services.common.storage import s3_stale_uploads
from services.common.storage.protocol import FileInfo
from services.common.storage.s3 import S3Store
from tests.support.s3_bucket import Bucket
from tests.support.tcp_relay import deny_upload_listings, tcp_relay

pytestmark = pytest.mark.slow

_KEYS = ["p/_rejects/a.jsonl.gz", "p/a.jsonl"]
_FOREIGN_KEYS = ["elsewhere/a.jsonl", "p/notes.txt"]
_LATER = dt.timedelta(hours=7)
_LARGE = FileInfo("large.jsonl", 1, '"its-etag"', 0)


@pytest.fixture
async def client(bucket: Bucket) -> AsyncIterator[Any]:
    """Create a client of a bucket with unfinished uploads of a run and of others."""
    async with open_client("s3", endpoint_url=bucket.endpoint_url, max_connections=4) as client:
        for key in _KEYS + _FOREIGN_KEYS:
            upload = await client.create_multipart_upload(Bucket=bucket.name, Key=key)
            part = {"Bucket": bucket.name, "Key": key, "UploadId": upload["UploadId"], "PartNumber": 1}
            await client.upload_part(**part, Body=b"x")
        yield client


async def _remaining_uploads(client: Any, bucket: Bucket) -> list[str]:
    page = await client.list_multipart_uploads(Bucket=bucket.name)
    return sorted(upload["Key"] for upload in page.get("Uploads", ()))


def _advance_server_clock(parsed: Any, **_: object) -> None:
    """Advance the date of a response by hours."""
    parsed["ResponseMetadata"]["HTTPHeaders"]["date"] = format_datetime(dt.datetime.now(dt.UTC) + _LATER)


def _started_earlier(parsed: Any, **_: object) -> None:
    for upload in parsed.get("Uploads", ()):
        upload["Initiated"] -= _LATER


def _remove_date(parsed: Any, **_: object) -> None:
    del parsed["ResponseMetadata"]["HTTPHeaders"]["date"]


async def test_stale_uploads_are_aborted_after_hours(client: Any, bucket: Bucket) -> None:
    """A run aborts unfinished uploads of its outputs hours after they began, by the server's clock.

    It leaves younger ones, and those of other keys.
    """
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _FOREIGN_KEYS)
    client.meta.events.register("after-call.s3.ListMultipartUploads", _advance_server_clock)
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == _FOREIGN_KEYS


async def test_old_upload_with_a_recent_part_is_not_aborted(client: Any, bucket: Bucket) -> None:
    """An upload that began hours ago, but has a recent part, belongs to a running process and is kept."""
    client.meta.events.register("after-call.s3.ListMultipartUploads", _started_earlier)
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _FOREIGN_KEYS)


async def test_stale_uploads_are_aborted_during_a_long_run(
    client: Any, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on checks for stale uploads again, with the next large file after an interval."""
    store = S3Store(client, bucket=bucket.name, prefix="p/")
    await store.check_writable()
    client.meta.events.register("after-call.s3.ListMultipartUploads", _advance_server_clock)
    await _write_large(store)
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _FOREIGN_KEYS)
    monkeypatch.setattr(s3_stale_uploads, "_CHECK_INTERVAL_SECONDS", 0)
    await _write_large(store)
    assert await _remaining_uploads(client, bucket) == _FOREIGN_KEYS


async def _write_large(store: S3Store) -> None:
    async with store.create(_LARGE.name, _LARGE) as upload:
        await upload.write(bytes(6 * 2**20))
        await upload.complete()


async def test_denied_listing_of_uploads_is_logged_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If uploads may not be listed, one warning is logged, and large files are still written."""
    monkeypatch.setattr(s3_stale_uploads, "_CHECK_INTERVAL_SECONDS", 0)
    with tcp_relay(bucket.endpoint_url, reject=deny_upload_listings) as relay:
        async with open_client("s3", endpoint_url=relay.url, max_connections=4) as client:
            store = S3Store(client, bucket=bucket.name, prefix="p/")
            await store.check_writable()
            for _ in range(2):
                await _write_large(store)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert messages == [f"s3://{bucket.name}/p/: unfinished uploads are left as they are: Access Denied."]


async def test_uploads_are_kept_if_the_server_has_no_clock(
    client: Any, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    """If responses have no date, the age of uploads is unknown: they are kept, and the run logs it."""
    client.meta.events.register("after-call.s3.ListMultipartUploads", _remove_date)
    await S3Store(client, bucket=bucket.name, prefix="p/").check_writable()
    assert await _remaining_uploads(client, bucket) == sorted(_KEYS + _FOREIGN_KEYS)
    assert "does not tell the time" in caplog.text
