"""A prefix of a bucket: listed page by page, read as a stream that goes on where it broke."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from botocore.exceptions import ClientError

from services.common.file_names import is_input
from services.common.memory_budget import MemoryBudget
from services.common.storage import s3_hints
from services.common.storage.input_listing import NameCounts
from services.common.storage.protocol import ExistingOutput, FileInfo
from services.common.storage.s3_archive import is_archived
from services.common.storage.s3_client import error_code, require_field, translate_errors
from services.common.storage.s3_download import S3Download
from services.common.storage.s3_listing import KeyListing
from services.common.storage.s3_stale_uploads import StaleUploads
from services.common.storage.s3_upload import (
    ETAG_METADATA_KEY,
    PART_BUDGET_BYTES,
    ConditionalWriteSupport,
    S3Upload,
)

_NOT_FOUND_CODES = {"404", "NoSuchKey"}


class S3Store:
    """The objects whose keys begin with `prefix` (empty, or ending in "/").

    `parts_room`: what the parts on their way to all stores of this process may have of its memory.
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

    def uri(self, name: str) -> str:
        """The object's address."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    async def explain_empty(self) -> str:
        """What else is in the bucket."""
        return await s3_hints.explain_empty_prefix(self._client, bucket=self._bucket, prefix=self._prefix)

    @property
    def is_unordered(self) -> bool:
        """Whether a listing has shown it."""
        return self._listing.is_unordered

    async def list(self, *, after: str = "", listing: NameCounts | None = None) -> AsyncIterator[FileInfo]:
        """In the order of their keys, a page of 1000 at a time; where the server has an order."""
        with translate_errors(self.uri("")):
            async for entry in self._listing.entries(after=after):
                name = entry["Key"].removeprefix(self._prefix)
                if is_input(name):
                    yield _to_file_info(name, entry, size="Size", place=self.uri(name))
                elif listing is not None:
                    listing.count_ignored(name)

    async def get_info(self, name: str) -> FileInfo:
        """One object."""
        with translate_errors(self.uri(name)):
            try:
                head = await self._client.head_object(**self._object_args(name))
            except ClientError as error:
                if error_code(error) in _NOT_FOUND_CODES:
                    await self._check_bucket()
                raise
        return _to_file_info(name, head, size="ContentLength", place=self.uri(name))

    async def _check_bucket(self) -> None:
        """Raise ClientError if the bucket is gone. The answer to a HEAD has no body, which would say so."""
        try:
            await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        except ClientError as error:
            if error_code(error) == "NoSuchBucket":
                raise

    def read(self, item: FileInfo) -> AsyncGenerator[bytes]:
        """The object's bytes, of the very version that was listed; a stream that breaks is taken up again."""
        target, place = self._object_args(item.name), self.uri(item.name)
        return S3Download(self._client, uri=place, target=target, item=item).chunks()

    async def check_writable(self) -> None:
        """See that the bucket is there and answers us; end what killed runs left of uploads."""
        with translate_errors(self.uri("")):
            await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        await self._stale_uploads.abort_stale()

    async def existing_output(self, name: str, source: FileInfo) -> ExistingOutput | None:
        """The output's metadata carries its input's version."""
        with translate_errors(self.uri(name)):
            try:
                head = await self._client.head_object(**self._object_args(name))
            except ClientError as error:
                if error_code(error) in _NOT_FOUND_CODES:
                    return None
                raise
        mark = head.get("Metadata", {}).get(ETAG_METADATA_KEY)
        return ExistingOutput(
            require_field(head, "ETag", place=self.uri(name)), is_from_input=bool(mark == source.version)
        )

    def create(self, name: str, source: FileInfo, *, expected_version: str | None = None) -> S3Upload:
        """Begin `name`."""
        return S3Upload(
            self._client,
            uri=self.uri(name),
            target=self._object_args(name),
            source_version=source.version,
            expected_version=expected_version,
            conditional_writes=self._conditional_writes,
            stale_uploads=self._stale_uploads,
            part_budget=self._part_budget,
        )

    async def remove(self, name: str) -> None:
        """Remove `name` if it is there (S3 does not mind if it is not)."""
        with translate_errors(self.uri(name)):
            await self._client.delete_object(**self._object_args(name))

    def _object_args(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}


def _to_file_info(name: str, answer: Any, *, size: str, place: str) -> FileInfo:
    modified_ns = int(require_field(answer, "LastModified", place=place).timestamp()) * 1_000_000_000
    etag = require_field(answer, "ETag", place=place)
    return FileInfo(name, require_field(answer, size, place=place), etag, modified_ns, is_archived(answer))
