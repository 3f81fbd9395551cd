"""A bucket on the S3 test server, with the operations that tests need."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from services.common.aws_client import open_client
from tests.support.s3_server import S3Server

_T = TypeVar("_T")


class Bucket:
    """A new bucket. Each operation opens and closes a client."""

    def __init__(self, server: S3Server, name: str) -> None:
        self.endpoint_url = server.endpoint_url
        self.name = name
        self._run(lambda client: client.create_bucket(Bucket=name))

    def _run(self, operation: Callable[[Any], Coroutine[Any, Any, _T]]) -> _T:
        async def run() -> _T:
            async with open_client("s3", endpoint_url=self.endpoint_url, max_connections=2) as client:
                return await operation(client)

        return asyncio.run(run())

    def put(self, key: str, data: bytes, **headers: object) -> str:
        """Store an object and return its ETag."""
        etag: str = self._run(
            lambda client: client.put_object(Bucket=self.name, Key=key, Body=data, **headers)
        )["ETag"]
        return etag

    def restore_object(self, key: str) -> None:
        """Restore an object from cold storage."""
        restore = {"Bucket": self.name, "Key": key, "RestoreRequest": {"Days": 1}}
        self._run(lambda client: client.restore_object(**restore))

    def delete_object(self, key: str) -> None:
        """Delete an object."""
        self._run(lambda client: client.delete_object(Bucket=self.name, Key=key))

    def delete_bucket(self) -> None:
        """Delete the bucket, which must be empty."""
        self._run(lambda client: client.delete_bucket(Bucket=self.name))

    def get(self, key: str, **headers: object) -> bytes:
        """Return the content of an object."""

        async def read(client: Any) -> bytes:
            response = await client.get_object(Bucket=self.name, Key=key, **headers)
            async with response["Body"] as body:
                data: bytes = await body.read()
                return data

        return self._run(read)

    def input_etag(self, key: str) -> str:
        """Return the ETag of the input that the object's metadata names."""
        head = self._run(lambda client: client.head_object(Bucket=self.name, Key=key))
        return str(head["Metadata"]["input-etag"])

    def list_keys(self) -> list[str]:
        """Return all keys in the bucket."""
        page = self._run(lambda client: client.list_objects_v2(Bucket=self.name))
        return [entry["Key"] for entry in page.get("Contents", ())]

    def count_unfinished_uploads(self) -> int:
        """Return the number of multipart uploads that are neither completed nor aborted."""
        page = self._run(lambda client: client.list_multipart_uploads(Bucket=self.name))
        return len(page.get("Uploads", ()))
