"""Write an object only if the bucket still holds the expected version of it.

S3 checks such a condition itself. With a server that does not, the object is checked just before the write.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from botocore.exceptions import ClientError

from services.common.aws_errors import error_code
from services.common.storage.errors import AlreadyDoneError, OutputConflictError
from services.common.storage.protocol import ABSENT
from services.common.storage.s3_client import translate_errors
from services.common.storage.s3_stale_uploads import server_time

ETAG_METADATA_KEY = "input-etag"
_UPLOAD_ID_METADATA_KEY = "upload"
# S3's codes for another write under way; with them: for a condition that does not hold, and for an upload
# that was aborted or completed.
_CONCURRENT_WRITE_CODES = {"ConditionalRequestConflict", "409"}
CONFLICT_CODES = {"PreconditionFailed", "412", "NoSuchUpload"} | _CONCURRENT_WRITE_CODES
# S3's codes for a condition on an object that does not exist.
_NOT_FOUND_CODES = {"NoSuchKey", "404"}
_CONFLICT_RETRY_SECONDS = (0.5, 1.0, 2.0)
# S3 gives times in whole seconds.
_SERVER_CLOCK_RESOLUTION_SECONDS = 2.0
# The codes of servers without conditional writes. 400 is too common to be taken for that without a check.
_UNSUPPORTED_CODES = {"NotImplemented", "501"}
_MAYBE_UNSUPPORTED_CODES = {"InvalidRequest", "InvalidArgument", "BadRequest", "400"}
_log = logging.getLogger(__name__)


class ConditionalWriteSupport:
    """What one store has found out about its server.

    State: `is_missing`, whether the server is known to lack conditional writes.
    """

    def __init__(self) -> None:
        self.is_missing = False

    def report_missing(self, uri: str) -> None:
        """Remember that conditional writes are missing, and log it once."""
        if not self.is_missing:
            _log.warning(
                "%s: the server has no conditional writes; outputs are looked at just before they are put, "
                "so two workers on one file may both write it",
                uri,
            )
        self.is_missing = True


class ConditionalWrite:
    """The last request of an upload, which makes the object appear.

    `expected_version` is the version to replace, ABSENT if none; None: replace any. `metadata` go with the
    object: they name its input, and this upload.
    """

    def __init__(
        self,
        client: Any,
        *,
        uri: str,
        object_args: dict[str, str],
        source_version: str,
        expected_version: str | None,
        support: ConditionalWriteSupport,
    ) -> None:
        self._client = client
        self._uri = uri
        self._object_args = object_args
        self.metadata = {ETAG_METADATA_KEY: source_version, _UPLOAD_ID_METADATA_KEY: secrets.token_hex(8)}
        self._expected_version = expected_version
        self._support = support
        self._started_at = time.monotonic()

    async def finalize(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Send `request` with the condition. Raises AlreadyDoneError, OutputConflictError or StorageError.

        When a response is lost the client repeats the request, which is then rejected because its first
        attempt has succeeded. So a rejection is compared with what the bucket holds.
        """
        with translate_errors(self._uri):
            condition = self._condition()
            for retry_seconds in (*_CONFLICT_RETRY_SECONDS, None):
                try:
                    await self._send_with_condition(request, condition)
                except ClientError as error:
                    if error_code(error) not in (
                        CONFLICT_CODES | _NOT_FOUND_CODES if condition else CONFLICT_CODES
                    ):
                        raise
                    next_condition = await self._resolve_conflict(error, condition)
                    if next_condition is None:
                        return
                    condition = next_condition
                    if retry_seconds is None:
                        raise OutputConflictError from error
                    if error_code(error) in _CONCURRENT_WRITE_CODES:
                        await asyncio.sleep(retry_seconds)
                else:
                    return

    def _condition(self) -> dict[str, str]:
        if self._expected_version is None:
            return {}
        if self._expected_version == ABSENT:
            return {"IfNoneMatch": "*"}
        return {"IfMatch": self._expected_version}

    async def _send_with_condition(
        self, request: Callable[..., Awaitable[Any]], condition: dict[str, str]
    ) -> None:
        if condition and self._support.is_missing:
            await self._send_after_check(request)
            return
        try:
            await request(**condition)
        except ClientError as error:
            if not condition or error_code(error) not in _UNSUPPORTED_CODES | _MAYBE_UNSUPPORTED_CODES:
                raise
            # If the condition was not the reason, the request fails again in the same way.
            await self._send_after_check(request)
            self._support.report_missing(self._uri)

    async def _send_after_check(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Check the condition, then send the request without it. This narrows the race but cannot end it."""
        existing = await self._head_existing()
        if (existing["ETag"] if existing else ABSENT) != self._expected_version:
            if self._is_from_same_input(existing):
                raise AlreadyDoneError
            if existing and not self._predates_upload(existing):
                raise OutputConflictError
        await request()

    async def _resolve_conflict(
        self, rejection: ClientError, condition: dict[str, str]
    ) -> dict[str, str] | None:
        """Return the condition for the next attempt, or None if the object is the one of this upload.

        Raises AlreadyDoneError or OutputConflictError if another process has written the object since this
        upload began. An object from before that was only missing in the listing: it is replaced.
        """
        existing = await self._head_existing()
        if existing and self._is_of_this_upload(existing):
            return None
        if self._is_from_same_input(existing):
            raise AlreadyDoneError from rejection
        code = error_code(rejection)
        if code == "NoSuchUpload":
            raise OutputConflictError from rejection
        if existing is None:
            return {"IfNoneMatch": "*"} if condition else {}
        if condition and self._predates_upload(existing):
            return {"IfMatch": existing["ETag"]}
        if code in _CONCURRENT_WRITE_CODES:
            return condition
        raise OutputConflictError from rejection

    def _is_of_this_upload(self, existing: dict[str, Any]) -> bool:
        upload_id = existing.get("Metadata", {}).get(_UPLOAD_ID_METADATA_KEY)
        return bool(upload_id == self.metadata[_UPLOAD_ID_METADATA_KEY])

    def _is_from_same_input(self, existing: dict[str, Any] | None) -> bool:
        """Return whether the object was made from the same input."""
        if existing is None:
            return False
        return bool(existing.get("Metadata", {}).get(ETAG_METADATA_KEY) == self.metadata[ETAG_METADATA_KEY])

    def _predates_upload(self, existing: dict[str, Any]) -> bool:
        """Return whether the object is older than this upload, by the server's clock alone."""
        now = server_time(existing)
        if now is None or "LastModified" not in existing:
            return False
        age_seconds: float = (now - existing["LastModified"]).total_seconds()
        return age_seconds > time.monotonic() - self._started_at + _SERVER_CLOCK_RESOLUTION_SECONDS

    async def _head_existing(self) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = await self._client.head_object(**self._object_args)
        except ClientError as error:
            if error_code(error) in _NOT_FOUND_CODES:
                return None
            raise
        return head
