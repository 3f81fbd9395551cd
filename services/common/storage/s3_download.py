"""Read the listed version of an object, resume a broken stream, and check the content at the end."""

import asyncio
import base64
import hashlib
import logging
import zlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from botocore.exceptions import ClientError, FlexibleChecksumError

from services.common.aws_errors import CONNECTION_ERRORS, error_code, error_reason
from services.common.storage.errors import InputChangedError, StorageError
from services.common.storage.protocol import FileInfo
from services.common.storage.s3_client import translate_errors

_READ_BYTES = 2**20
_MAX_CONSECUTIVE_BREAKS = 5
_FIRST_RETRY_SECONDS = 0.2
_PARTIAL_CONTENT = 206
_log = logging.getLogger(__name__)


class S3Download:
    """One read of an object.

    The client compares a whole object with the checksum that the server sends with it. A resumed read is
    checked here, because the client sees it as two parts.

    State: `_position`, the number of bytes read; `_checksum`, of these bytes and of the whole object.
    """

    def __init__(self, client: Any, *, uri: str, object_args: dict[str, str], file: FileInfo) -> None:
        self._client = client
        self._uri = uri
        self._object_args = object_args
        self._file = file
        self._position = 0
        self._checksum = _Checksum({})

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yield the content in chunks. Raises InputChangedError or StorageError."""
        attempts = self._client.meta.config.retries.get("total_max_attempts", _MAX_CONSECUTIVE_BREAKS + 1)
        breaks = 0
        while True:
            reason = "the stream ended"
            try:
                async with aclosing(self._stream()) as stream:
                    async for data in stream:
                        breaks = 0
                        yield data
            except FlexibleChecksumError as error:
                raise StorageError(uri=self._uri, reason=error_reason(error)) from error
            except CONNECTION_ERRORS as error:
                reason = error_reason(error)
            # A connection that broke behind the last byte has lost nothing.
            if self._position >= self._file.size_bytes:
                self._check_content()
                return
            breaks += 1
            message = f"the download broke at byte {self._position} of {self._file.size_bytes}: {reason}"
            if breaks > min(_MAX_CONSECUTIVE_BREAKS, attempts - 1):
                raise StorageError(uri=self._uri, reason=message)
            _log.debug("%s: %s", self._uri, message)
            await asyncio.sleep(_FIRST_RETRY_SECONDS * 2 ** (breaks - 1))

    async def _stream(self) -> AsyncGenerator[bytes]:
        """Yield the bytes from `_position` on, until the connection breaks."""
        response = await self._request()
        body = response["Body"]
        try:
            # A server that ignores conditions sends another version than the requested one.
            if response.get("ETag") != self._file.version:
                raise InputChangedError
            to_skip = self._bytes_to_skip(response)
            while data := await body.read(_READ_BYTES):
                skipped = min(to_skip, len(data))
                to_skip -= skipped
                new_data = data[skipped:] if skipped else data
                if new_data:
                    self._position += len(new_data)
                    self._checksum.update(new_data)
                    yield new_data
        finally:
            body.close()

    async def _request(self) -> Any:
        """Request the missing bytes. The client itself retries a request that fails."""
        range_args = {"Range": f"bytes={self._position}-"} if self._position else {}
        with translate_errors(self._uri):
            try:
                return await self._client.get_object(
                    **self._object_args, **range_args, IfMatch=self._file.version
                )
            except ClientError as error:
                if error_code(error) in {"PreconditionFailed", "412"}:
                    raise InputChangedError from error
                raise

    def _bytes_to_skip(self, response: Any) -> int:
        """Return how many bytes of this stream were read before. Keep the checksum of a first response."""
        if not self._position:
            self._checksum = _Checksum(response)
            return 0
        # A server that ignores ranges sends the whole object.
        if response["ResponseMetadata"]["HTTPStatusCode"] != _PARTIAL_CONTENT:
            return self._position
        expected_start = f"bytes {self._position}-"
        if not response.get("ContentRange", expected_start).startswith(expected_start):
            message = f"the server sent {response['ContentRange']} when asked for {expected_start}"
            raise StorageError(uri=self._uri, reason=message)
        return 0

    def _check_content(self) -> None:
        """Raise StorageError if the size or the checksum is wrong."""
        if self._position > self._file.size_bytes:
            message = f"the server sent {self._position} bytes of an object of {self._file.size_bytes}"
            raise StorageError(uri=self._uri, reason=message)
        if self._checksum.mismatch:
            message = f"checksum mismatch: {self._checksum.mismatch}"
            raise StorageError(uri=self._uri, reason=message)


class _Crc32:
    """CRC32 with the methods of a hashlib algorithm."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


# The checksums that the client can check without an extra library, by their names in the response, in the
# client's order of preference.
_ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ChecksumCRC32": _Crc32,
    "ChecksumSHA1": partial(hashlib.sha1, usedforsecurity=False),
    "ChecksumSHA256": hashlib.sha256,
}


class _Checksum:
    """The checksum of a whole object, if the response has one. One of its parts (`…-3`) does not count."""

    def __init__(self, response: Any) -> None:
        usable = (name for name in _ALGORITHMS if response.get(name) and "-" not in response[name])
        self._name = next(usable, "")
        self._algorithm = _ALGORITHMS[self._name]() if self._name else None
        self._expected = response.get(self._name, "")

    def update(self, data: bytes) -> None:
        """Add the next bytes."""
        if self._algorithm:
            self._algorithm.update(data)

    @property
    def mismatch(self) -> str:
        """Return how the checksum differs from the expected one, or ""."""
        actual = base64.b64encode(self._algorithm.digest()).decode() if self._algorithm else self._expected
        return "" if actual == self._expected else f"{self._name} is {self._expected}, of the bytes {actual}"
