"""An object in the making: one put when small, else parts; it appears whole, once, or not at all."""

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
from services.common.memory_budget import MemoryBudget
from services.common.storage.errors import AlreadyDoneError, OutputConflictError, StorageError
from services.common.storage.protocol import ABSENT
from services.common.storage.s3_client import error_code, require_field, translate_errors
from services.common.storage.s3_stale_uploads import StaleUploads, server_time

ETAG_METADATA_KEY, _UPLOAD_ID_METADATA_KEY = "input-etag", "upload"
_PART_BYTES = 5 * 2**20  # the least that S3 takes, of at most 10,000: outputs up to 50 GB
PART_BUDGET_BYTES = 4 * _PART_BYTES
"""Of all uploads of a process together: what is on its way, beside what each of them has of its next part."""
# The codes of S3 for a condition that does not hold, another write under way, an upload that is aborted or
# completed, and a condition on an object that is gone.
_CONCURRENT_WRITE_CODES = {"ConditionalRequestConflict", "409"}
_CONFLICT_CODES = {"PreconditionFailed", "412", "NoSuchUpload"} | _CONCURRENT_WRITE_CODES
_NOT_FOUND_CODES = {"NoSuchKey", "404"}
_CONFLICT_RETRY_SECONDS = (0.5, 1.0, 2.0)
_SERVER_CLOCK_RESOLUTION_SECONDS = 2.0  # S3 tells its time in whole seconds
# What a server says that has no conditional writes; 400 is too common to be taken for it by itself.
_UNSUPPORTED_CODES = {"NotImplemented", "501"}
_MAYBE_UNSUPPORTED_CODES = {"InvalidRequest", "InvalidArgument", "BadRequest", "400"}
_log = logging.getLogger("augmenter")


class ConditionalWriteSupport:
    """What one store's uploads learn of its server. State: `missing`, once it is known to have none."""

    def __init__(self) -> None:
        self.is_missing = False

    def report_missing(self, place: str) -> None:
        """Say it once."""
        if not self.is_missing:
            _log.warning(
                "%s: the server has no conditional writes; outputs are looked at just before they are put, "
                "so two workers on one file may both write it",
                place,
            )
        self.is_missing = True


class S3Upload:
    """One part is on its way while the next is filled.

    State: `_part` and `_part_bytes` (not yet sent), `_sending` (the part on its way), `_parts` (arrived).
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
        self._condition = (
            {}
            if expected_version is None
            else {"IfNoneMatch": "*"}
            if expected_version == ABSENT
            else {"IfMatch": expected_version}
        )
        self._part: list[memoryview] = []
        self._part_bytes = 0
        self._upload: dict[str, str] | None = None  # as soon as there is a first whole part
        self._part_task: asyncio.Task[dict[str, Any]] | None = None
        self._parts: list[dict[str, Any]] = []
        # Else S3 takes the checksums that the client adds to the parts for those of another upload.
        self._checksums = {"ChecksumAlgorithm": "CRC32"} if declares_checksums(client) else {}
        self._started_at = time.monotonic()

    async def __aenter__(self) -> Self:
        """Nothing is there to be made before the first part."""
        return self

    async def write(self, data: bytes) -> None:
        """Add bytes; waits while a part is on its way and the next is full."""
        rest = memoryview(data)
        while self._part_bytes + len(rest) >= _PART_BYTES:  # all of one size: some servers want that
            missing = _PART_BYTES - self._part_bytes
            self._part.append(rest[:missing])
            rest = rest[missing:]
            await self._send(self._take_part())
        if rest:
            self._part.append(rest)
            self._part_bytes += len(rest)

    async def complete(self) -> None:
        """Let the object appear. Raises DoneElsewhereError or OutputTakenError if somebody came first."""
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
        self._part, self._part_bytes = [], 0
        return part

    async def _finalize(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Send what makes the object appear.

        The client sends it again when the answer is lost, and is then refused because of its own first try.
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
                    again = await self._resolve_conflict(error, condition)
                    if again is None:
                        return
                    condition = again
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
            await self._finalize_after_head(request)  # fails the same way, if it was something else
            self._conditional_writes.report_missing(self._uri)

    async def _finalize_after_head(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Check the condition, then send without it: that narrows the race, it cannot end it."""
        there = await self._head_existing()
        if (there["ETag"] if there else ABSENT) != self._expected_version:
            if self._is_from_same_input(there):
                raise AlreadyDoneError
            if there and not self._predates_upload(there):
                raise OutputConflictError
        await request()

    async def _resolve_conflict(
        self, refusal: ClientError, condition: dict[str, str]
    ) -> dict[str, str] | None:
        """Return the condition of the next try, or None if the object is there and is this upload's.

        Raises DoneElsewhereError or OutputTakenError if another process made it meanwhile. One that was there
        before this upload began was only missing in the listing: it is replaced.
        """
        there = await self._head_existing()
        if (
            there
            and there.get("Metadata", {}).get(_UPLOAD_ID_METADATA_KEY)
            == self._metadata[_UPLOAD_ID_METADATA_KEY]
        ):
            return None
        if self._is_from_same_input(there):
            raise AlreadyDoneError from refusal
        code = error_code(refusal)
        if code == "NoSuchUpload":
            raise OutputConflictError from refusal
        if there is None:
            return {"IfNoneMatch": "*"} if condition else {}
        if condition and self._predates_upload(there):
            return {"IfMatch": there["ETag"]}
        if code in _CONCURRENT_WRITE_CODES:
            return condition
        raise OutputConflictError from refusal

    def _is_from_same_input(self, there: dict[str, Any] | None) -> bool:
        """Return whether what is there was made from the same input."""
        return bool(
            there and there.get("Metadata", {}).get(ETAG_METADATA_KEY) == self._metadata[ETAG_METADATA_KEY]
        )

    def _predates_upload(self, there: dict[str, Any]) -> bool:
        """Return whether the object is older than this upload, by the server's clock alone."""
        now = server_time(there)
        if now is None or "LastModified" not in there:
            return False
        age_seconds: float = (now - there["LastModified"]).total_seconds()
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
                made = await self._client.create_multipart_upload(
                    **self._target, **self._checksums, Metadata=self._metadata
                )
            self._upload = {"UploadId": made["UploadId"]}
        await self._await_part()
        await self._part_budget.acquire(len(part))
        self._part_task = asyncio.create_task(self._send_part(self._upload, len(self._parts) + 1, part))
        self._part_task.add_done_callback(partial(_release_budget, self._part_budget, len(part)))

    async def _send_part(self, upload: dict[str, str], number: int, part: bytes) -> dict[str, Any]:
        with translate_errors(self._uri):
            try:
                sent = await self._client.upload_part(
                    **self._target, **upload, **self._checksums, PartNumber=number, Body=part
                )
            except ClientError as error:
                if error_code(error) in _CONFLICT_CODES:
                    raise OutputConflictError from error
                raise
        arrived = {"PartNumber": number, "ETag": require_field(sent, "ETag", place=self._uri)}
        if self._checksums and "ChecksumCRC32" in sent:
            arrived["ChecksumCRC32"] = sent["ChecksumCRC32"]
        return arrived

    async def _await_part(self) -> None:
        if self._part_task is not None:
            self._parts.append(await self._part_task)
            self._part_task = None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what was begun, so that no parts are stored (and paid for)."""
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


def _release_budget(room: MemoryBudget, size_bytes: int, _: object) -> None:
    room.release(size_bytes)
