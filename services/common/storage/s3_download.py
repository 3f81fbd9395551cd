"""An object's bytes: of the version that was listed, resumed where the stream broke, checked at the end."""

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

from services.common.aws_errors import error_reason
from services.common.storage.errors import InputChangedError, StorageError
from services.common.storage.protocol import FileInfo
from services.common.storage.s3_client import CONNECTION_ERRORS, error_code, translate_errors

_READ_BYTES = 2**20
_MAX_CONSECUTIVE_BREAKS = 5
_FIRST_RETRY_SECONDS = 0.2
_PARTIAL_CONTENT = 206
_log = logging.getLogger("augmenter")


class S3Download:
    """One read of an object.

    The client checks a whole object against the checksum that the server sends with it. A resumed one is
    checked here, because the client sees two parts of it.

    State: `_position`, `_checksum` (of the bytes so far, and the server's of the object).
    """

    def __init__(self, client: Any, *, uri: str, target: dict[str, str], item: FileInfo) -> None:
        self._client = client
        self._uri = uri
        self._target = target
        self._item = item
        self._position = 0
        self._checksum = _Checksum({})

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yield the bytes in pieces. Raises InputChangedError or StoreError."""
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
            if self._position >= self._item.size_bytes:  # whatever broke behind the last byte
                self._check_whole()
                return
            breaks += 1
            message = f"the download broke at byte {self._position} of {self._item.size_bytes}: {reason}"
            if breaks > min(_MAX_CONSECUTIVE_BREAKS, attempts - 1):
                raise StorageError(uri=self._uri, reason=message)
            _log.debug("%s: %s", self._uri, message)
            await asyncio.sleep(_FIRST_RETRY_SECONDS * 2 ** (breaks - 1))

    async def _stream(self) -> AsyncGenerator[bytes]:
        answer = await self._request()
        body = answer["Body"]
        try:
            if answer.get("ETag") != self._item.version:  # the server ignores conditions
                raise InputChangedError
            to_skip = self._bytes_to_skip(answer)
            while data := await body.read(_READ_BYTES):
                skipped = min(to_skip, len(data))
                to_skip -= skipped
                fresh = data[skipped:] if skipped else data
                if fresh:
                    self._position += len(fresh)
                    self._checksum.update(fresh)
                    yield fresh
        finally:
            body.close()

    async def _request(self) -> Any:
        """Request what is missing; the client has retried what failed here."""
        wanted = {"Range": f"bytes={self._position}-"} if self._position else {}
        with translate_errors(self._uri):
            try:
                return await self._client.get_object(**self._target, **wanted, IfMatch=self._item.version)
            except ClientError as error:
                if error_code(error) in {"PreconditionFailed", "412"}:
                    raise InputChangedError from error
                raise

    def _bytes_to_skip(self, answer: Any) -> int:
        """Note the object's checksum; return how many bytes of this stream are known already."""
        if not self._position:
            self._checksum = _Checksum(answer)
            return 0
        if answer["ResponseMetadata"]["HTTPStatusCode"] != _PARTIAL_CONTENT:  # the server ignores ranges
            return self._position
        begins = f"bytes {self._position}-"
        if not answer.get("ContentRange", begins).startswith(begins):
            message = f"the server sent {answer['ContentRange']} when asked for {begins}"
            raise StorageError(uri=self._uri, reason=message)
        return 0

    def _check_whole(self) -> None:
        if self._position > self._item.size_bytes:
            message = f"the server sent {self._position} bytes of an object of {self._item.size_bytes}"
            raise StorageError(uri=self._uri, reason=message)
        if self._checksum.mismatch:
            message = f"checksum mismatch: {self._checksum.mismatch}"
            raise StorageError(uri=self._uri, reason=message)


class _Crc32:
    """CRC32 as hashlib has its algorithms."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


# What the client checks itself without another library: names in the answer, in its order.
_ALGORITHMS: dict[str, Callable[[], Any]] = {
    "ChecksumCRC32": _Crc32,
    "ChecksumSHA1": partial(hashlib.sha1, usedforsecurity=False),
    "ChecksumSHA256": hashlib.sha256,
}


class _Checksum:
    """The whole object's checksum, if the server sent one: not one of its parts' checksums (`…-3`)."""

    def __init__(self, answer: Any) -> None:
        usable = (name for name in _ALGORITHMS if answer.get(name) and "-" not in answer[name])
        self._name = next(usable, "")
        self._algorithm = _ALGORITHMS[self._name]() if self._name else None
        self._expected = answer.get(self._name, "")

    def update(self, data: bytes) -> None:
        """Add the next bytes."""
        if self._algorithm:
            self._algorithm.update(data)

    @property
    def mismatch(self) -> str:
        """How it differs, or ""."""
        found = base64.b64encode(self._algorithm.digest()).decode() if self._algorithm else self._expected
        return "" if found == self._expected else f"{self._name} is {self._expected}, of the bytes {found}"
