"""Upload an object: in one request if it is small, else in parts. It appears as a whole, or not at all."""

import asyncio
import logging
from functools import partial
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import ClientError

from services.common.aws_client import declares_checksums
from services.common.aws_errors import error_code
from services.common.compat import override
from services.common.memory_budget import MemoryBudget
from services.common.storage.errors import OutputConflictError, StorageError
from services.common.storage.protocol import Upload
from services.common.storage.s3_client import require_field, translate_errors
from services.common.storage.s3_conditional import CONFLICT_CODES, ConditionalWrite, ConditionalWriteSupport
from services.common.storage.s3_stale_uploads import StaleUploads

# The smallest part that S3 accepts, of at most 10,000 parts: outputs can have up to 50 GB.
_PART_BYTES = 5 * 2**20
PART_BUDGET_BYTES = 4 * _PART_BYTES
"""Memory for the parts that all uploads of a process send at a time, besides the next part of each upload."""
_log = logging.getLogger(__name__)


class S3Upload(Upload):
    """One part is sent while the next is filled.

    State: `_chunks` and `_filled_bytes` (the next part), `_part_task` (the part that is being sent), `_parts`
    (sent), `_upload` (set from the first whole part on).
    """

    def __init__(
        self,
        client: Any,
        *,
        uri: str,
        object_args: dict[str, str],
        source_version: str,
        expected_version: str | None,
        conditional_writes: ConditionalWriteSupport,
        stale_uploads: StaleUploads,
        part_budget: MemoryBudget,
    ) -> None:
        self._client = client
        self._uri = uri
        self._object_args = object_args
        self._stale_uploads = stale_uploads
        self._part_budget = part_budget
        self._write = ConditionalWrite(
            client,
            uri=uri,
            object_args=object_args,
            source_version=source_version,
            expected_version=expected_version,
            support=conditional_writes,
        )
        self._chunks: list[memoryview] = []
        self._filled_bytes = 0
        self._upload: dict[str, str] | None = None
        self._part_task: asyncio.Task[dict[str, Any]] | None = None
        self._parts: list[dict[str, Any]] = []
        # S3 rejects the checksums that the client adds to the parts unless the upload has declared them.
        self._checksum_args = {"ChecksumAlgorithm": "CRC32"} if declares_checksums(client) else {}

    @override
    async def __aenter__(self) -> Self:
        return self

    @override
    async def write(self, data: bytes) -> None:
        rest = memoryview(data)
        # All parts but the last have the same size: some servers require that.
        while self._filled_bytes + len(rest) >= _PART_BYTES:
            missing_bytes = _PART_BYTES - self._filled_bytes
            self._chunks.append(rest[:missing_bytes])
            rest = rest[missing_bytes:]
            await self._start_sending(self._take_part())
        if rest:
            self._chunks.append(rest)
            self._filled_bytes += len(rest)

    @override
    async def complete(self) -> None:
        if self._upload is None:
            await self._write.finalize(
                partial(
                    self._client.put_object,
                    **self._object_args,
                    Body=self._take_part(),
                    Metadata=self._write.metadata,
                )
            )
            return
        if self._chunks:
            await self._start_sending(self._take_part())
        await self._await_part()
        await self._write.finalize(
            partial(
                self._client.complete_multipart_upload,
                **self._object_args,
                **self._upload,
                MultipartUpload={"Parts": self._parts},
            )
        )
        self._upload = None

    def _take_part(self) -> bytes:
        part = b"".join(self._chunks)
        self._chunks = []
        self._filled_bytes = 0
        return part

    async def _start_sending(self, part: bytes) -> None:
        """Wait for the previous part and for memory, then send this part in the background."""
        if self._upload is None:
            await self._stale_uploads.abort_stale()
            with translate_errors(self._uri):
                response = await self._client.create_multipart_upload(
                    **self._object_args, **self._checksum_args, Metadata=self._write.metadata
                )
            self._upload = {"UploadId": response["UploadId"]}
        await self._await_part()
        await self._part_budget.acquire(len(part))
        self._part_task = asyncio.create_task(self._send_part(self._upload, len(self._parts) + 1, part))
        self._part_task.add_done_callback(partial(_release_budget, self._part_budget, len(part)))

    async def _send_part(self, upload: dict[str, str], number: int, part: bytes) -> dict[str, Any]:
        with translate_errors(self._uri):
            try:
                response = await self._client.upload_part(
                    **self._object_args, **upload, **self._checksum_args, PartNumber=number, Body=part
                )
            except ClientError as error:
                if error_code(error) in CONFLICT_CODES:
                    raise OutputConflictError from error
                raise
        sent = {"PartNumber": number, "ETag": require_field(response, "ETag", uri=self._uri)}
        if self._checksum_args and "ChecksumCRC32" in response:
            sent["ChecksumCRC32"] = response["ChecksumCRC32"]
        return sent

    async def _await_part(self) -> None:
        if self._part_task is not None:
            self._parts.append(await self._part_task)
            self._part_task = None

    @override
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Abort an unfinished upload, so that no parts are stored (and paid for).
        if self._part_task is not None:
            self._part_task.cancel()
            await asyncio.gather(self._part_task, return_exceptions=True)
        if self._upload is not None:
            try:
                with translate_errors(self._uri):
                    await self._client.abort_multipart_upload(**self._object_args, **self._upload)
            except StorageError as failure:
                if "NoSuchUpload" not in str(failure.__cause__):
                    _log.warning(
                        "%s: the unfinished upload could not be aborted: %s", self._uri, failure.reason
                    )


def _release_budget(budget: MemoryBudget, size_bytes: int, _: object) -> None:
    budget.release(size_bytes)
