"""A prefix of a bucket: listed page by page, read as a stream that goes on where it broke."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from botocore.exceptions import ClientError

from services.augmenter.errors import InputChangedError, StoreError
from services.augmenter.listing import InputListing
from services.augmenter.object_store import s3_hints
from services.augmenter.object_store.protocol import Item, Made
from services.augmenter.object_store.s3_archive import is_archived
from services.augmenter.object_store.s3_client import BROKEN, code_of, named
from services.augmenter.object_store.s3_leftovers import Leftovers
from services.augmenter.object_store.s3_upload import MARK, PARTS_ROOM_BYTES, Conditions, S3Upload
from services.augmenter.room import Room
from services.common.file_names import is_input

_READ_BYTES = 2**20
_BREAKS_IN_A_ROW = 5
_FIRST_WAIT_SECONDS = 0.2
_log = logging.getLogger("augmenter")


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

    def place(self, name: str) -> str:
        """The object's address."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    async def hint(self) -> str:
        """What else is in the bucket."""
        return await s3_hints.hint(self._client, bucket=self._bucket, prefix=self._prefix)

    async def list(self, *, after: str = "", listing: InputListing | None = None) -> AsyncIterator[Item]:
        """In the order of their keys, a page of 1000 at a time."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket,
            Prefix=self._prefix,
            **({"StartAfter": self._prefix + after} if after else {}),
        )
        with named(self.place("")):
            async for page in pages:
                for entry in page.get("Contents", ()):
                    name = entry["Key"].removeprefix(self._prefix)
                    if is_input(name):
                        yield _item(name, entry["Size"], entry)
                    elif listing is not None:
                        listing.ignore(name)

    async def find(self, name: str) -> Item:
        """One object."""
        with named(self.place(name)):
            head = await self._client.head_object(**self._target(name))
        return _item(name, head["ContentLength"], head)

    async def read(self, item: Item) -> AsyncGenerator[bytes]:
        """The object's bytes, of the very version that was listed; a stream that breaks is taken up again."""
        position = breaks = 0
        while True:
            try:
                async with aclosing(self._read_from(item, position)) as stream:
                    async for data in stream:
                        position += len(data)
                        breaks = 0
                        yield data
                if position == item.size_bytes:
                    return
                message = f"the object ended after {position} of {item.size_bytes} bytes"
                raise ConnectionError(message)
            except BROKEN as error:
                breaks += 1
                if breaks > _BREAKS_IN_A_ROW:
                    raise StoreError(place=self.place(item.name), reason=str(error)) from error
                _log.debug("%s: broke at byte %d: %s", self.place(item.name), position, error)
                await asyncio.sleep(_FIRST_WAIT_SECONDS * 2 ** (breaks - 1))

    async def _read_from(self, item: Item, position: int) -> AsyncGenerator[bytes]:
        wanted = {"Range": f"bytes={position}-"} if position else {}
        try:
            answer = await self._client.get_object(**self._target(item.name), **wanted, IfMatch=item.version)
        except ClientError as error:
            if code_of(error) in {"PreconditionFailed", "412"}:
                raise InputChangedError from error
            with named(self.place(item.name)):
                raise
        body = answer["Body"]
        try:
            if answer["ETag"] != item.version:  # the server ignores conditions
                raise InputChangedError
            while data := await body.read(_READ_BYTES):
                yield data
        finally:
            body.close()

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
                if code_of(error) in {"404", "NoSuchKey"}:
                    return None
                raise
        mark = head.get("Metadata", {}).get(MARK)
        return Made(head["ETag"], from_this_input=bool(mark == source.version))

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


def _item(name: str, size_bytes: int, answer: Any) -> Item:
    modified_ns = int(answer["LastModified"].timestamp()) * 1_000_000_000
    return Item(name, size_bytes, answer["ETag"], modified_ns, is_archived(answer))
