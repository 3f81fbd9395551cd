"""A prefix of a bucket: streamed both ways, an upload completed only when the whole file is done."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

from services.augmenter.errors import InputChangedError, StoreError
from services.augmenter.object_store.protocol import Item, is_input

_READ_BYTES = 2**20
_PART_BYTES = 8 * 2**20  # of at most 10,000: outputs up to 80 GB
_MARK = "input-etag"
_PLAIN_REASONS = {
    "NoSuchBucket": "the bucket does not exist",
    "NoSuchKey": "does not exist",
    "404": "does not exist",
    "403": "access denied",
}


@asynccontextmanager
async def s3_client(*, endpoint_url: str | None, connections: int) -> AsyncIterator[Any]:
    """A client with the usual AWS credentials; an endpoint of one's own is addressed by path.

    Raises StoreError for settings that no client can be made of.
    """
    config = AioConfig(
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=connections,
        retries={"mode": "standard", "total_max_attempts": 5},
        s3={"addressing_style": "path"} if endpoint_url else None,
    )
    session: Any = get_session()  # type: ignore[no-untyped-call]
    async with AsyncExitStack() as stack:
        try:
            client = await stack.enter_async_context(
                session.create_client("s3", endpoint_url=endpoint_url, config=config)
            )
        except (BotoCoreError, ValueError) as error:
            raise StoreError(place="the S3 client", reason=str(error)) from error
        yield client


class S3Store:
    """The objects whose keys begin with `prefix` (empty, or ending in "/")."""

    def __init__(self, client: Any, *, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix

    def place(self, name: str) -> str:
        """The object's address."""
        return f"s3://{self._bucket}/{self._prefix}{name}"

    async def list(self) -> AsyncIterator[Item]:
        """In the order of their keys."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=self._prefix
        )
        with _named(self.place("")):
            async for page in pages:
                for entry in page.get("Contents", ()):
                    name = entry["Key"].removeprefix(self._prefix)
                    if is_input(name):
                        yield _item(name, entry["Size"], entry)

    async def find(self, name: str) -> Item:
        """One object."""
        with _named(self.place(name)):
            head = await self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
        return _item(name, head["ContentLength"], head)

    async def read(self, item: Item) -> AsyncGenerator[bytes]:
        """The object's bytes, of the very version that was listed."""
        with _named(self.place(item.name)):
            answer = await self._client.get_object(
                Bucket=self._bucket, Key=self._prefix + item.name, IfMatch=item.version
            )
        body = answer["Body"]
        try:
            while data := await self._next(item.name, body):
                yield data
        finally:
            body.close()

    async def _next(self, name: str, body: Any) -> bytes:
        with _named(self.place(name)):
            data: bytes = await body.read(_READ_BYTES)
            return data

    async def prepare(self) -> None:
        """See that the bucket is there and answers us."""
        with _named(self.place("")):
            await self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)

    async def is_made_from(self, name: str, source: Item) -> bool:
        """The output's metadata carries its input's version."""
        with _named(self.place(name)):
            try:
                head = await self._client.head_object(Bucket=self._bucket, Key=self._prefix + name)
            except ClientError as error:
                if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 404:  # noqa: PLR2004
                    return False
                raise
        return bool(head.get("Metadata", {}).get(_MARK) == source.version)

    def create(self, name: str, source: Item) -> "S3Upload":
        """Begin `name`."""
        return S3Upload(
            self._client,
            place=self.place(name),
            target={"Bucket": self._bucket, "Key": self._prefix + name},
            mark={_MARK: source.version},
        )

    async def remove(self, name: str) -> None:
        """Remove `name` if it is there (S3 does not mind if it is not)."""
        with _named(self.place(name)):
            await self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


class S3Upload:
    """One put when small; else parts, one of them on its way while the next is filled.

    State: `_part` (bytes not yet sent), `_sending` (the part on its way), `_parts` (those that arrived).
    """

    def __init__(self, client: Any, *, place: str, target: dict[str, str], mark: dict[str, str]) -> None:
        self._client = client
        self._place = place
        self._target = target
        self._mark = mark
        self._part = bytearray()
        self._upload: dict[str, str] | None = None  # as soon as there is a first whole part
        self._sending: asyncio.Task[dict[str, Any]] | None = None
        self._parts: list[dict[str, Any]] = []

    async def __aenter__(self) -> Self:
        """Nothing is there to be made before the first part."""
        return self

    async def write(self, data: bytes) -> None:
        """Add bytes; waits while a part is on its way and the next is full."""
        self._part += data
        while len(self._part) >= _PART_BYTES:
            part = bytes(self._part[:_PART_BYTES])
            del self._part[:_PART_BYTES]
            await self._send(part)

    async def complete(self) -> None:
        """Let the object appear, marked with its input's version."""
        if self._upload is None and self._sending is None:
            with _named(self._place):
                await self._client.put_object(**self._target, Body=bytes(self._part), Metadata=self._mark)
            return
        if self._part:
            await self._send(bytes(self._part))
        await self._arrived()
        with _named(self._place):
            await self._client.complete_multipart_upload(
                **self._target, **(self._upload or {}), MultipartUpload={"Parts": self._parts}
            )
        self._upload = None

    async def _send(self, part: bytes) -> None:
        if self._upload is None:
            with _named(self._place):
                made = await self._client.create_multipart_upload(**self._target, Metadata=self._mark)
            self._upload = {"UploadId": made["UploadId"]}
        await self._arrived()
        self._sending = asyncio.create_task(self._send_part(self._upload, len(self._parts) + 1, part))

    async def _send_part(self, upload: dict[str, str], number: int, part: bytes) -> dict[str, Any]:
        with _named(self._place):
            sent = await self._client.upload_part(**self._target, **upload, PartNumber=number, Body=part)
        return {"PartNumber": number, "ETag": sent["ETag"]}

    async def _arrived(self) -> None:
        if self._sending is not None:
            self._parts.append(await self._sending)
            self._sending = None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort what was begun, so that no parts are stored (and paid for)."""
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        if self._upload is not None:
            with contextlib.suppress(StoreError), _named(self._place):
                await self._client.abort_multipart_upload(**self._target, **self._upload)


def _item(name: str, size_bytes: int, answer: Any) -> Item:
    modified_ns = int(answer["LastModified"].timestamp()) * 1_000_000_000
    return Item(name, size_bytes, answer["ETag"], modified_ns)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Name the place in every error of the bucket or of the way to it."""
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in {"PreconditionFailed", "412"}:
            raise InputChangedError from error
        reason = error.response.get("Error", {}).get("Message") or code
        raise StoreError(place=place, reason=_PLAIN_REASONS.get(code, reason)) from error
    except (BotoCoreError, HTTPClientError, aiohttp.ClientError, TimeoutError, OSError) as error:
        raise StoreError(place=place, reason=str(error) or type(error).__name__) from error
    except ValueError as error:  # a key that cannot be sent
        raise StoreError(place=place, reason=str(error)) from error
