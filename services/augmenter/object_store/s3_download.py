"""An object's bytes: of the version that was listed, resumed where the stream broke, checked at the end."""

import asyncio
import base64
import logging
import zlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from botocore.exceptions import ClientError, FlexibleChecksumError

from services.augmenter.errors import InputChangedError, StoreError
from services.augmenter.object_store.protocol import Item
from services.augmenter.object_store.s3_client import BROKEN, code_of, named
from services.common.aws_errors import reason_of

_READ_BYTES = 2**20
_BREAKS_IN_A_ROW = 5
_FIRST_WAIT_SECONDS = 0.2
_PARTIAL_CONTENT = 206
_log = logging.getLogger("augmenter")


class S3Download:
    """One read of an object.

    The client checks a whole object against the checksum that the server sends with it. A resumed one is
    checked here, because the client sees two parts of it.

    State: `_position`, `_crc` (of the bytes so far), `_expected_crc` (the server's for the object, if known).
    """

    def __init__(self, client: Any, *, place: str, target: dict[str, str], item: Item) -> None:
        self._client = client
        self._place = place
        self._target = target
        self._item = item
        self._position = 0
        self._crc = 0
        self._expected_crc: int | None = None

    async def chunks(self) -> AsyncGenerator[bytes]:
        """Yield the bytes in pieces. Raises InputChangedError or StoreError."""
        attempts = self._client.meta.config.retries.get("total_max_attempts", _BREAKS_IN_A_ROW + 1)
        breaks = 0
        while True:
            reason = "the stream ended"
            try:
                async with aclosing(self._stream()) as stream:
                    async for data in stream:
                        breaks = 0
                        yield data
            except FlexibleChecksumError as error:
                raise StoreError(place=self._place, reason=reason_of(error)) from error
            except BROKEN as error:
                reason = reason_of(error)
            if self._position >= self._item.size_bytes:  # whatever broke behind the last byte
                self._check_whole()
                return
            breaks += 1
            message = f"the download broke at byte {self._position} of {self._item.size_bytes}: {reason}"
            if breaks > min(_BREAKS_IN_A_ROW, attempts - 1):
                raise StoreError(place=self._place, reason=message)
            _log.debug("%s: %s", self._place, message)
            await asyncio.sleep(_FIRST_WAIT_SECONDS * 2 ** (breaks - 1))

    async def _stream(self) -> AsyncGenerator[bytes]:
        answer = await self._answer()
        body = answer["Body"]
        try:
            if answer.get("ETag") != self._item.version:  # the server ignores conditions
                raise InputChangedError
            to_skip = self._note(answer)
            while data := await body.read(_READ_BYTES):
                skipped = min(to_skip, len(data))
                to_skip -= skipped
                fresh = data[skipped:] if skipped else data
                if fresh:
                    self._position += len(fresh)
                    if self._expected_crc is not None:
                        self._crc = zlib.crc32(fresh, self._crc)
                    yield fresh
        finally:
            body.close()

    async def _answer(self) -> Any:
        """Request what is missing; the client has retried what failed here."""
        wanted = {"Range": f"bytes={self._position}-"} if self._position else {}
        with named(self._place):
            try:
                return await self._client.get_object(**self._target, **wanted, IfMatch=self._item.version)
            except ClientError as error:
                if code_of(error) in {"PreconditionFailed", "412"}:
                    raise InputChangedError from error
                raise

    def _note(self, answer: Any) -> int:
        """Note the object's checksum; return how many bytes of this stream are known already."""
        if not self._position:
            self._crc, self._expected_crc = 0, _crc_of(answer)
            return 0
        if answer["ResponseMetadata"]["HTTPStatusCode"] != _PARTIAL_CONTENT:  # the server ignores ranges
            return self._position
        begins = f"bytes {self._position}-"
        if not answer.get("ContentRange", begins).startswith(begins):
            message = f"the server sent {answer['ContentRange']} when asked for {begins}"
            raise StoreError(place=self._place, reason=message)
        return 0

    def _check_whole(self) -> None:
        if self._position > self._item.size_bytes:
            message = f"the server sent {self._position} bytes of an object of {self._item.size_bytes}"
            raise StoreError(place=self._place, reason=message)
        if self._expected_crc not in {None, self._crc}:
            message = f"checksum mismatch: CRC32 {self._crc:08x}, the server has {self._expected_crc:08x}"
            raise StoreError(place=self._place, reason=message)


def _crc_of(answer: Any) -> int | None:
    """Return the whole object's CRC32; None where there is none, or one of its parts' checksums."""
    text = answer.get("ChecksumCRC32", "")
    if not text or "-" in text:
        return None
    return int.from_bytes(base64.b64decode(text), "big")
