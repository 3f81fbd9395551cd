"""Abort the multipart uploads that killed runs left behind.

An upload counts as abandoned when no part was added for hours, by the server's clock.
"""

import datetime as dt
import logging
import time
from email.utils import parsedate_to_datetime
from typing import Any

from botocore.exceptions import ClientError

from services.common.aws_errors import error_code
from services.common.codec import format_for_name
from services.common.storage.errors import StorageError
from services.common.storage.s3_client import translate_errors

# No file takes this long between two parts of its output or of its rejects: in six hours the model answers
# more pairs than 5 GB have lines. Aborting a live upload would cost the work on its file, never an output.
_IDLE_TIME = dt.timedelta(hours=6)
_CHECK_INTERVAL_SECONDS = 3600.0
_log = logging.getLogger(__name__)


class StaleUploads:
    """The unfinished uploads under one store's prefix.

    An upload does not name the process that writes it, and another process may be writing the same key. So an
    upload is aborted only if it was started, and its last part was received, hours ago.

    State: `_checked_at`, when the last check began; `_has_warned`, whether a failed check was logged.
    """

    def __init__(self, client: Any, *, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix
        self._checked_at: float | None = None
        self._has_warned = False

    async def abort_stale(self) -> None:
        """Abort abandoned uploads, at most once an hour, since a run may take months. Never raise an error.

        If the server does not support or allow listing uploads, they are kept. Then only a lifecycle rule of
        the bucket can remove them.
        """
        now = time.monotonic()
        if self._checked_at is not None and now - self._checked_at < _CHECK_INTERVAL_SECONDS:
            return
        self._checked_at = now
        uri = f"s3://{self._bucket}/{self._prefix}"
        try:
            with translate_errors(uri):
                await self._abort_all(uri)
        except StorageError as error:
            level = logging.DEBUG if self._has_warned else logging.WARNING
            _log.log(level, "%s: unfinished uploads are left as they are: %s", uri, error.reason)
            self._has_warned = True

    async def _abort_all(self, uri: str) -> None:
        pages = self._client.get_paginator("list_multipart_uploads")
        async for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix):
            before = _required_server_time(page, uri) - _IDLE_TIME
            for upload in page.get("Uploads", ()):
                # This program writes only keys with a known format.
                if format_for_name(upload["Key"]) and upload["Initiated"] < before:
                    await self._abort_if_idle({"Key": upload["Key"], "UploadId": upload["UploadId"]}, before)

    async def _abort_if_idle(self, upload: dict[str, str], before: dt.datetime) -> None:
        try:
            parts = self._client.get_paginator("list_parts").paginate(Bucket=self._bucket, **upload)
            async for page in parts:
                if any(part["LastModified"] >= before for part in page.get("Parts", ())):
                    return
            await self._client.abort_multipart_upload(Bucket=self._bucket, **upload)
        except ClientError as error:
            # Its writer may have completed or aborted it meanwhile.
            if error_code(error) != "NoSuchUpload":
                raise


def server_time(response: Any) -> dt.datetime | None:
    """Return when the server sent a response, or None. This machine's clock may be wrong."""
    try:
        sent_at = parsedate_to_datetime(response["ResponseMetadata"]["HTTPHeaders"]["date"])
    except (KeyError, ValueError):
        return None
    return sent_at if sent_at.tzinfo else sent_at.replace(tzinfo=dt.UTC)


def _required_server_time(response: Any, uri: str) -> dt.datetime:
    sent_at = server_time(response)
    if sent_at is None:
        raise StorageError(uri=uri, reason="the server does not tell the time")
    return sent_at
