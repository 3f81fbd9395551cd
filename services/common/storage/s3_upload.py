"""Uploads an object: one request if it is small, else parts. It appears as a whole, or not at all."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import ClientError

from services.common.aws_client import declares_checksums
from services.common.compat import override
from services.common.memory_budget import MemoryBudget
from services.common.storage.errors import AlreadyDoneError, OutputConflictError, StorageError
from services.common.storage.protocol import ABSENT, Upload
from services.common.storage.s3_client import error_code, require_field, translate_errors
from services.common.storage.s3_stale_uploads import StaleUploads, server_time

ETAG_METADATA_KEY = "input-etag"
_UPLOAD_ID_METADATA_KEY = "upload"
# The minimum size of a part in S3. With the maximum of 10,000 parts, an output may have 50 GB.
_PART_BYTES = 5 * 2**20
# The bytes that all uploads of a process may be sending. Each upload holds its next part in addition.
PART_BUDGET_BYTES = 4 * _PART_BYTES
# The codes of S3 for a concurrent write, for a condition that does not hold or an upload that is aborted or
# completed, and for a condition on an object that does not exist.
_CONCURRENT_WRITE_CODES = {"ConditionalRequestConflict", "409"}
_CONFLICT_CODES = {"PreconditionFailed", "412", "NoSuchUpload"} | _CONCURRENT_WRITE_CODES
_NOT_FOUND_CODES = {"NoSuchKey", "404"}
_CONFLICT_RETRY_SECONDS = (0.5, 1.0, 2.0)
# S3 gives times in whole seconds.
_SERVER_CLOCK_RESOLUTION_SECONDS = 2.0
# The codes of servers without conditional writes. The status 400 is too common to prove it.
_UNSUPPORTED_CODES = {"NotImplemented", "501"}
_MAYBE_UNSUPPORTED_CODES = {"InvalidRequest", "InvalidArgument", "BadRequest", "400"}
_log = logging.getLogger(__name__)


class ConditionalWriteSupport:
    """Whether the server of one storage has conditional writes.

    State: `is_missing`, set once the server is known to have none.
    """

    def __init__(self) -> None:
        self.is_missing = False

    def report_missing(self, uri: str) -> None:
        """Log once that the server has no conditional writes."""
        if not self.is_missing:
            _log.warning(
                "%s: the server has no conditional writes; outputs are looked at just before they are put, "
                "so two workers on one file may both write it",
                uri,
            )
        self.is_missing = True


class S3Upload(Upload):
    """An upload that sends one part while the next is filled.

    State: `_part` and `_part_bytes` (not yet sent), `_upload` (the id, once the first part is full),
    `_part_task` (sends a part), `_parts` (those that were sent).
    """

    def __init__(
        self,
        client: Any,
        *,
        uri: str,
        target: dict[str, str],
        source_version: str,
        expected_version: str | None,
        conditional_writes: ConditionalWriteSupport,
        stale_uploads: StaleUploads,
        part_budget: MemoryBudget,
    ) -> None:
        self._client = client
        self._uri = uri
        self._target = target
        self._metadata = {ETAG_METADATA_KEY: source_version, _UPLOAD_ID_METADATA_KEY: secrets.token_hex(8)}
        self._expected_version = expected_version
        self._conditional_writes = conditional_writes
        self._stale_uploads = stale_uploads
        self._part_budget = part_budget
        self._condition = _condition_for(expected_version)
        self._part: list[memoryview] = []
        self._part_bytes = 0
        self._upload: dict[str, str] | None = None
        self._part_task: asyncio.Task[dict[str, Any]] | None = None
        self._parts: list[dict[str, Any]] = []
        # Without this, S3 rejects the checksums that the client adds to the parts.
        self._checksums = {"ChecksumAlgorithm": "CRC32"} if declares_checksums(client) else {}
        self._started_at = time.monotonic()

    @override
    async def __aenter__(self) -> Self:
        return self

    @override
    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        # All parts but the last have the same size, which some servers require.
        while self._part_bytes + len(rest) >= _PART_BYTES:
            missing = _PART_BYTES - self._part_bytes
            self._part.append(rest[:missing])
            rest = rest[missing:]
            await self._send(self._take_part())
        if rest:
            self._part.append(rest)
            self._part_bytes += len(rest)

    @override
    async def complete(self) -> None:
        if self._upload is None:
            await self._finalize(
                partial(
                    self._client.put_object, **self._target, Body=self._take_part(), Metadata=self._metadata
                )
            )
            return
        if self._part:
            await self._send(self._take_part())
        await self._await_part()
        await self._finalize(
            partial(
                self._client.complete_multipart_upload,
                **self._target,
                **self._upload,
                MultipartUpload={"Parts": self._parts},
            )
        )
        self._upload = None

    def _take_part(self) -> bytes:
        part = b"".join(self._part)
        self._part = []
        self._part_bytes = 0
        return part

    async def _finalize(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Send the request that makes the object appear.

        If the response is lost, the client sends the request again, which then conflicts with its own first
        attempt. So after a conflict, the existing object is examined.
        """
        with translate_errors(self._uri):
            condition = self._condition
            for wait_seconds in (*_CONFLICT_RETRY_SECONDS, None):
                try:
                    await self._finalize_conditionally(request, condition)
                except ClientError as error:
                    if error_code(error) not in (
                        _CONFLICT_CODES | _NOT_FOUND_CODES if condition else _CONFLICT_CODES
                    ):
                        raise
                    next_condition = await self._resolve_conflict(error, condition)
                    if next_condition is None:
                        return
                    condition = next_condition
                    if wait_seconds is None:
                        raise OutputConflictError from error
                    if error_code(error) in _CONCURRENT_WRITE_CODES:
                        await asyncio.sleep(wait_seconds)
                else:
                    return

    async def _finalize_conditionally(
        self, request: Callable[..., Awaitable[Any]], condition: dict[str, str]
    ) -> None:
        if condition and self._conditional_writes.is_missing:
            await self._finalize_after_head(request)
            return
        try:
            await request(**condition)
        except ClientError as error:
            if not condition or error_code(error) not in _UNSUPPORTED_CODES | _MAYBE_UNSUPPORTED_CODES:
                raise
            # If the error had another cause, this request fails in the same way.
            await self._finalize_after_head(request)
            self._conditional_writes.report_missing(self._uri)

    async def _finalize_after_head(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Check the condition with a HEAD, then send without it, which narrows the race but leaves it."""
        existing = await self._head_existing()
        if (existing["ETag"] if existing else ABSENT) != self._expected_version:
            if self._is_from_same_input(existing):
                raise AlreadyDoneError
            if existing and not self._predates_upload(existing):
                raise OutputConflictError
        await request()

    async def _resolve_conflict(
        self, conflict: ClientError, condition: dict[str, str]
    ) -> dict[str, str] | None:
        """Return the condition of the next attempt, or None if the object exists and is this upload's.

        Raises AlreadyDoneError or OutputConflictError if another process has written the object since this
        upload began. An older object was only missing in the listing, and is replaced.
        """
        existing = await self._head_existing()
        if (
            existing
            and existing.get("Metadata", {}).get(_UPLOAD_ID_METADATA_KEY)
            == self._metadata[_UPLOAD_ID_METADATA_KEY]
        ):
            return None
        if self._is_from_same_input(existing):
            raise AlreadyDoneError from conflict
        code = error_code(conflict)
        if code == "NoSuchUpload":
            raise OutputConflictError from conflict
        if existing is None:
            return {"IfNoneMatch": "*"} if condition else {}
        if condition and self._predates_upload(existing):
            return {"IfMatch": existing["ETag"]}
        if code in _CONCURRENT_WRITE_CODES:
            return condition
        raise OutputConflictError from conflict

    def _is_from_same_input(self, existing: dict[str, Any] | None) -> bool:
        """Return whether the existing object was made from the same input."""
        return bool(
            existing
            and existing.get("Metadata", {}).get(ETAG_METADATA_KEY) == self._metadata[ETAG_METADATA_KEY]
        )

    def _predates_upload(self, existing: dict[str, Any]) -> bool:
        """Return whether the object is older than this upload, by the server's clock alone."""
        now = server_time(existing)
        if now is None or "LastModified" not in existing:
            return False
        age_seconds: float = (now - existing["LastModified"]).total_seconds()
        return age_seconds > time.monotonic() - self._started_at + _SERVER_CLOCK_RESOLUTION_SECONDS

    async def _head_existing(self) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = await self._client.head_object(**self._target)
        except ClientError as error:
            if error_code(error) in _NOT_FOUND_CODES:
                return None
            raise
        return head

    async def _send(self, part: bytes) -> None:
        if self._upload is None:
            await self._stale_uploads.abort_stale()
            with translate_errors(self._uri):
                created = await self._client.create_multipart_upload(
                    **self._target, **self._checksums, Metadata=self._metadata
                )
            self._upload = {"UploadId": created["UploadId"]}
        await self._await_part()
        await self._part_budget.acquire(len(part))
        self._part_task = asyncio.create_task(self._send_part(self._upload, len(self._parts) + 1, part))
        self._part_task.add_done_callback(partial(_release_budget, self._part_budget, len(part)))

    async def _send_part(self, upload: dict[str, str], number: int, part: bytes) -> dict[str, Any]:
        with translate_errors(self._uri):
            try:
                response = await self._client.upload_part(
                    **self._target, **upload, **self._checksums, PartNumber=number, Body=part
                )
            except ClientError as error:
                if error_code(error) in _CONFLICT_CODES:
                    raise OutputConflictError from error
                raise
        entry = {"PartNumber": number, "ETag": require_field(response, "ETag", uri=self._uri)}
        if self._checksums and "ChecksumCRC32" in response:
            entry["ChecksumCRC32"] = response["ChecksumCRC32"]
        return entry

    async def _await_part(self) -> None:
        if self._part_task is not None:
            self._parts.append(await self._part_task)
            self._part_task = None

    @override
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Parts of an upload that is not aborted would be stored, and paid for.
        if self._part_task is not None:
            self._part_task.cancel()
            await asyncio.gather(self._part_task, return_exceptions=True)
        if self._upload is not None:
            try:
                with translate_errors(self._uri):
                    await self._client.abort_multipart_upload(**self._target, **self._upload)
            except StorageError as failure:
                if "NoSuchUpload" not in str(failure.__cause__):
                    _log.warning(
                        "%s: the unfinished upload could not be aborted: %s", self._uri, failure.reason
                    )


def _condition_for(expected_version: str | None) -> dict[str, str]:
    if expected_version is None:
        return {}
    if expected_version == ABSENT:
        return {"IfNoneMatch": "*"}
    return {"IfMatch": expected_version}


def _release_budget(budget: MemoryBudget, size_bytes: int, _: object) -> None:
    budget.release(size_bytes)
