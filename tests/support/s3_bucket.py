"""A bucket as a test sees it."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from services.common.storage.s3_client import aws_client
from tests.support.s3_server import S3Server

_T = TypeVar("_T")


class Bucket:
    """A bucket as the test sees it, with a client of its own."""

    def __init__(self, server: S3Server, name: str) -> None:
        self.endpoint_url = server.endpoint_url
        self.name = name
        self._do(lambda client: client.create_bucket(Bucket=name))

    def _do(self, use: Callable[[Any], Coroutine[Any, Any, _T]]) -> _T:
        async def run() -> _T:
            async with aws_client("s3", endpoint_url=self.endpoint_url, connections=2) as client:
                return await use(client)

        return asyncio.run(run())

    def put(self, key: str, data: bytes, **headers: object) -> str:
        """Store an object; its ETag."""
        etag: str = self._do(
            lambda client: client.put_object(Bucket=self.name, Key=key, Body=data, **headers)
        )["ETag"]
        return etag

    def restore(self, key: str) -> None:
        """Restore an object from cold storage."""
        restore = {"Bucket": self.name, "Key": key, "RestoreRequest": {"Days": 1}}
        self._do(lambda client: client.restore_object(**restore))

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._do(lambda client: client.delete_object(Bucket=self.name, Key=key))

    def remove(self) -> None:
        """Remove the bucket, which must be empty."""
        self._do(lambda client: client.delete_bucket(Bucket=self.name))

    def get(self, key: str, **headers: object) -> bytes:
        """An object's bytes."""

        async def read(client: Any) -> bytes:
            answer = await client.get_object(Bucket=self.name, Key=key, **headers)
            async with answer["Body"] as body:
                data: bytes = await body.read()
                return data

        return self._do(read)

    def mark(self, key: str) -> str:
        """What the object says it was made of."""
        head = self._do(lambda client: client.head_object(Bucket=self.name, Key=key))
        return str(head["Metadata"]["input-etag"])

    def listed(self) -> list[str]:
        """All keys."""
        page = self._do(lambda client: client.list_objects_v2(Bucket=self.name))
        return [entry["Key"] for entry in page.get("Contents", ())]

    def unfinished(self) -> int:
        """Multipart uploads neither completed nor aborted."""
        page = self._do(lambda client: client.list_multipart_uploads(Bucket=self.name))
        return len(page.get("Uploads", ()))
