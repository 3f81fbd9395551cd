"""A prefix of a bucket as a storage."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from botocore.exceptions import ClientError

from services.common.aws_errors import error_code
from services.common.compat import override
from services.common.file_names import is_input
from services.common.memory_budget import MemoryBudget
from services.common.storage import s3_hints
from services.common.storage.input_listing import NameCounts
from services.common.storage.protocol import ExistingOutput, FileInfo, Storage
from services.common.storage.s3_archive import is_archived
from services.common.storage.s3_client import require_field, translate_errors
from services.common.storage.s3_conditional import ETAG_METADATA_KEY, ConditionalWriteSupport
from services.common.storage.s3_download import S3Download
from services.common.storage.s3_listing import KeyListing
from services.common.storage.s3_stale_uploads import StaleUploads
from services.common.storage.s3_upload import PART_BUDGET_BYTES, S3Upload

_NOT_FOUND_CODES = {"404", "NoSuchKey"}


class S3Store(Storage):
    """The objects whose keys begin with `prefix` (empty, or ending in "/").

    `part_budget` limits the memory for the parts that all stores of this process send at a time.
    """

    def __init__(
        self, client: Any, *, bucket: str, prefix: str, part_budget: MemoryBudget | None = None
    ) -> None:
        self._client = client
        self._part_budget = part_budget or MemoryBudget(limit_bytes=PART_BUDGET_BYTES)
        self._bucket = bucket
        self._prefix = prefix
        self._conditional_writes = ConditionalWriteSupport()
        self._stale_uploads = StaleUploads(client, bucket=bucket, prefix=prefix)
        self._listing = KeyListing(client, bucket=bucket, prefix=prefix)

    @override
    def uri(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{name}"

    @override
    async def explain_empty(self) -> str:
        return await s3_hints.explain_empty_prefix(self._client, bucket=self._bucket, prefix=self._prefix)

    @property
    @override
    def is_unordered(self) -> bool:
        return self._listing.is_unordered

    @override
    async def list(
        self, *, after: str = "", name_counts: NameCounts | None = None
    ) -> AsyncIterator[FileInfo]:
        with translate_errors(self.uri("")):
            async for entry in self._listing.entries(after=after):
                name = entry["Key"].removeprefix(self._prefix)
                if is_input(name):
                    yield _to_file_info(name, entry, size="Size", uri=self.uri(name))
                elif name_counts is not None:
                    name_counts.count_ignored(name)

    @override
    async def get_info(self, name: str) -> FileInfo:
        with translate_errors(self.uri(name)):
            try:
                head = await self._client.head_object(**self._object_args(name))
            except ClientError as error:
                if error_code(error) in _NOT_FOUND_CODES:
                    await self._check_bucket()
                raise
        return _to_file_info(name, head, size="ContentLength", uri=self.uri(name))

    async def _check_bucket(self) -> None:
        """Raise ClientError if the bucket does not exist: a response to HEAD has no body with the reason."""
        try:
            await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        except ClientError as error:
            if error_code(error) == "NoSuchBucket":
                raise

    @override
    def read(self, file: FileInfo) -> AsyncGenerator[bytes]:
        object_args = self._object_args(file.name)
        return S3Download(self._client, uri=self.uri(file.name), object_args=object_args, file=file).chunks()

    @override
    async def check_writable(self) -> None:
        with translate_errors(self.uri("")):
            await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        await self._stale_uploads.abort_stale()

    @override
    async def existing_output(self, name: str, source: FileInfo) -> ExistingOutput | None:
        with translate_errors(self.uri(name)):
            try:
                head = await self._client.head_object(**self._object_args(name))
            except ClientError as error:
                if error_code(error) in _NOT_FOUND_CODES:
                    return None
                raise
        # The metadata of an output carry the version of its input.
        source_version = head.get("Metadata", {}).get(ETAG_METADATA_KEY)
        return ExistingOutput(
            require_field(head, "ETag", uri=self.uri(name)),
            is_from_input=bool(source_version == source.version),
        )

    @override
    def create(self, name: str, source: FileInfo, *, expected_version: str | None = None) -> S3Upload:
        return S3Upload(
            self._client,
            uri=self.uri(name),
            object_args=self._object_args(name),
            source_version=source.version,
            expected_version=expected_version,
            conditional_writes=self._conditional_writes,
            stale_uploads=self._stale_uploads,
            part_budget=self._part_budget,
        )

    @override
    async def remove(self, name: str) -> None:
        # S3 reports success as well if the object does not exist.
        with translate_errors(self.uri(name)):
            await self._client.delete_object(**self._object_args(name))

    def _object_args(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}


def _to_file_info(name: str, response: Any, *, size: str, uri: str) -> FileInfo:
    modified_ns = int(require_field(response, "LastModified", uri=uri).timestamp()) * 1_000_000_000
    etag = require_field(response, "ETag", uri=uri)
    return FileInfo(name, require_field(response, size, uri=uri), etag, modified_ns, is_archived(response))
