"""A prefix of a bucket: listed page by page, read as a stream that goes on where it broke."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from botocore.exceptions import ClientError

from services.common.file_names import is_input
from services.common.memory_budget import Room
from services.common.storage import s3_hints
from services.common.storage.input_listing import InputListing
from services.common.storage.protocol import Item, Made
from services.common.storage.s3_archive import is_archived
from services.common.storage.s3_client import code_of, named, required
from services.common.storage.s3_download import S3Download
from services.common.storage.s3_listing import Listing
from services.common.storage.s3_stale_uploads import Leftovers
from services.common.storage.s3_upload import MARK, PARTS_ROOM_BYTES, Conditions, S3Upload

_NO_OBJECT = {"404", "NoSuchKey"}


class S3Store:
    """The objects whose keys begin with `prefix` (empty, or ending in "/").

    `parts_room`: what the parts on their way to all stores of this process may have of its memory.
    """

    def __init__(self, client: Any, *, bucket: str, prefix: str, parts_room: Room | None = None) -> None:
        self._client = client
        self._parts_room = parts_room or Room(limit_bytes=PARTS_ROOM_BYTES)
        self._bucket = bucket
        self._prefix = prefix
        self._conditions = Conditions()
        self._leftovers = Leftovers(client, bucket=bucket, prefix=prefix)
        self._listing = Listing(client, bucket=bucket, prefix=prefix)

    def place(self, name: str) -> str:
        """The object's address."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    async def hint(self) -> str:
        """What else is in the bucket."""
        return await s3_hints.hint(self._client, bucket=self._bucket, prefix=self._prefix)

    @property
    def is_unordered(self) -> bool:
        """Whether a listing has shown it."""
        return self._listing.is_unordered

    async def list(self, *, after: str = "", listing: InputListing | None = None) -> AsyncIterator[Item]:
        """In the order of their keys, a page of 1000 at a time; where the server has an order."""
        with named(self.place("")):
            async for entry in self._listing.entries(after=after):
                name = entry["Key"].removeprefix(self._prefix)
                if is_input(name):
                    yield _item(name, entry, size="Size", place=self.place(name))
                elif listing is not None:
                    listing.ignore(name)

    async def find(self, name: str) -> Item:
        """One object."""
        with named(self.place(name)):
            try:
                head = await self._client.head_object(**self._target(name))
            except ClientError as error:
                if code_of(error) in _NO_OBJECT:
                    await self._check_bucket()
                raise
        return _item(name, head, size="ContentLength", place=self.place(name))

    async def _check_bucket(self) -> None:
        """Raise ClientError if the bucket is gone. The answer to a HEAD has no body, which would say so."""
        try:
            await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        except ClientError as error:
            if code_of(error) == "NoSuchBucket":
                raise

    def read(self, item: Item) -> AsyncGenerator[bytes]:
        """The object's bytes, of the very version that was listed; a stream that breaks is taken up again."""
        target, place = self._target(item.name), self.place(item.name)
        return S3Download(self._client, place=place, target=target, item=item).chunks()

    async def prepare(self) -> None:
        """See that the bucket is there and answers us; end what killed runs left of uploads."""
        with named(self.place("")):
            await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        await self._leftovers.end()

    async def made(self, name: str, source: Item) -> Made | None:
        """The output's metadata carries its input's version."""
        with named(self.place(name)):
            try:
                head = await self._client.head_object(**self._target(name))
            except ClientError as error:
                if code_of(error) in _NO_OBJECT:
                    return None
                raise
        mark = head.get("Metadata", {}).get(MARK)
        return Made(
            required(head, "ETag", place=self.place(name)), from_this_input=bool(mark == source.version)
        )

    def create(self, name: str, source: Item, *, onto: str | None = None) -> S3Upload:
        """Begin `name`."""
        return S3Upload(
            self._client,
            place=self.place(name),
            target=self._target(name),
            source_version=source.version,
            onto=onto,
            conditions=self._conditions,
            leftovers=self._leftovers,
            parts_room=self._parts_room,
        )

    async def remove(self, name: str) -> None:
        """Remove `name` if it is there (S3 does not mind if it is not)."""
        with named(self.place(name)):
            await self._client.delete_object(**self._target(name))

    def _target(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}


def _item(name: str, answer: Any, *, size: str, place: str) -> Item:
    modified_ns = int(required(answer, "LastModified", place=place).timestamp()) * 1_000_000_000
    etag = required(answer, "ETag", place=place)
    return Item(name, required(answer, size, place=place), etag, modified_ns, is_archived(answer))
