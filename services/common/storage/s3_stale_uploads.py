"""Uploads that killed runs left: ended once nobody has added to them for hours, by the server's own clock."""

import datetime as dt
import logging
import time
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import ClientError

from services.common.codec import format_for_name
from services.common.storage.errors import StorageError
from services.common.storage.s3_client import error_code, translate_errors

# Longer than any file is between two parts of its output or of its rejects: in six hours the model answers
# more pairs than 5 GB have lines. Ending a live one would cost its file's work, never an output.
_IDLE_TIME = dt.timedelta(hours=6)
_CHECK_INTERVAL_SECONDS = 3600.0
_log = logging.getLogger("augmenter")


class StaleUploads:
    """Those under one store's prefix.

    An upload does not say whose it is, and another process may be at work on the same key. So one is left
    alone until it shows no sign of life: it was begun, and its last part arrived, hours ago.

    State: `_looked_at`, when the last look began; `_said`, that the server does not let us look.
    """

    def __init__(self, client: Any, *, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._checked_at: float | None = None
        self._has_warned = False

    async def abort_stale(self) -> None:
        """At most once an hour, for runs that go on for months. It does not fail.

        A server that cannot list uploads, or may not, keeps what is left: a rule of the bucket must end it.
        """
        now = time.monotonic()
        if self._checked_at is not None and now - self._checked_at < _CHECK_INTERVAL_SECONDS:
            return
        self._checked_at = now
        place = f"s3://{self._bucket}/{self._prefix}"
        try:
            with translate_errors(place):
                await self._abort_all(place)
        except StorageError as error:
            level = logging.DEBUG if self._has_warned else logging.WARNING
            _log.log(level, "%s: unfinished uploads are left as they are: %s", place, error.reason)
            self._has_warned = True

    async def _abort_all(self, place: str) -> None:
        pages = self._client.get_paginator("list_multipart_uploads")
        async for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
            before = _required_server_time(page, place) - _IDLE_TIME
            for upload in page.get("Uploads", ()):
                if format_for_name(upload["Key"]) and upload["Initiated"] < before:  # else it cannot be ours
                    await self._abort_if_idle({"Key": upload["Key"], "UploadId": upload["UploadId"]}, before)

    async def _abort_if_idle(self, upload: dict[str, str], before: dt.datetime) -> None:
        try:
            parts = self._client.get_paginator("list_parts").paginate(Bucket=self._bucket, **upload)
            async for page in parts:
                if any(part["LastModified"] >= before for part in page.get("Parts", ())):
                    return
            await self._client.abort_multipart_upload(Bucket=self._bucket, **upload)
        except ClientError as error:
            if error_code(error) != "NoSuchUpload":  # it ended by itself
                raise


def _required_server_time(answer: Any, place: str) -> dt.datetime:
    found = server_time(answer)
    if found is None:
        raise StorageError(uri=place, reason="the server does not tell the time")
    return found


def server_time(answer: Any) -> dt.datetime | None:
    """Return the time that an answer was sent at: this machine's clock may be wrong."""
    try:
        found = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=dt.UTC)
