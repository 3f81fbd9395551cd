"""An object in the making: one put when small, else parts; it appears whole, once, or not at all."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import ClientError

from services.common.aws_client import declares_checksums
from services.common.memory_budget import Room
from services.common.storage.errors import DoneElsewhereError, OutputTakenError, StoreError
from services.common.storage.protocol import NOTHING
from services.common.storage.s3_client import code_of, named, required
from services.common.storage.s3_stale_uploads import Leftovers, server_time

MARK, _BY = "input-etag", "upload"
_PART_BYTES = 5 * 2**20  # the least that S3 takes, of at most 10,000: outputs up to 50 GB
PARTS_ROOM_BYTES = 4 * _PART_BYTES
"""Of all uploads of a process together: what is on its way, beside what each of them has of its next part."""
# The codes of S3 for a condition that does not hold, another write under way, an upload that is aborted or
# completed, and a condition on an object that is gone.
_CONFLICT = {"ConditionalRequestConflict", "409"}
_TAKEN = {"PreconditionFailed", "412", "NoSuchUpload"} | _CONFLICT
_GONE = {"NoSuchKey", "404"}
_CONFLICT_WAITS_SECONDS = (0.5, 1.0, 2.0)
_CLOCK_STEPS_SECONDS = 2.0  # S3 tells its time in whole seconds
# What a server says that has no conditional writes; 400 is too common to be taken for it by itself.
_NO_CONDITIONS = {"NotImplemented", "501"}
_PERHAPS_NO_CONDITIONS = {"InvalidRequest", "InvalidArgument", "BadRequest", "400"}
_log = logging.getLogger("augmenter")


class Conditions:
    """What one store's uploads learn of its server. State: `missing`, once it is known to have none."""

    def __init__(self) -> None:
        self.missing = False

    def found_missing(self, place: str) -> None:
        """Say it once."""
        if not self.missing:
            _log.warning(
                "%s: the server has no conditional writes; outputs are looked at just before they are put, "
                "so two workers on one file may both write it",
                place,
            )
        self.missing = True


class S3Upload:
    """One part is on its way while the next is filled.

    State: `_part` and `_part_bytes` (not yet sent), `_sending` (the part on its way), `_parts` (arrived).
    """

    def __init__(
        self,
        client: Any,
        *,
        place: str,
        target: dict[str, str],
        source_version: str,
        onto: str | None,
        conditions: Conditions,
        leftovers: Leftovers,
        parts_room: Room,
    ) -> None:
        self._client = client
        self._place = place
        self._target = target
        self._metadata = {MARK: source_version, _BY: secrets.token_hex(8)}
        self._onto = onto
        self._conditions = conditions
        self._leftovers = leftovers
        self._parts_room = parts_room
        self._condition = (
            {} if onto is None else {"IfNoneMatch": "*"} if onto == NOTHING else {"IfMatch": onto}
        )
        self._part: list[memoryview] = []
        self._part_bytes = 0
        self._upload: dict[str, str] | None = None  # as soon as there is a first whole part
        self._sending: asyncio.Task[dict[str, Any]] | None = None
        self._parts: list[dict[str, Any]] = []
        # Else S3 takes the checksums that the client adds to the parts for those of another upload.
        self._checksums = {"ChecksumAlgorithm": "CRC32"} if declares_checksums(client) else {}
        self._begun = time.monotonic()

    async def __aenter__(self) -> Self:
        """Nothing is there to be made before the first part."""
        return self

    async def write(self, data: bytes) -> None:
        """Add bytes; waits while a part is on its way and the next is full."""
        rest = memoryview(data)
        while self._part_bytes + len(rest) >= _PART_BYTES:  # all of one size: some servers want that
            missing = _PART_BYTES - self._part_bytes
            self._part.append(rest[:missing])
            rest = rest[missing:]
            await self._send(self._taken())
        if rest:
            self._part.append(rest)
            self._part_bytes += len(rest)

    async def complete(self) -> None:
        """Let the object appear. Raises DoneElsewhereError or OutputTakenError if somebody came first."""
        if self._upload is None:
            await self._at_end(
                partial(self._client.put_object, **self._target, Body=self._taken(), Metadata=self._metadata)
            )
            return
        if self._part:
            await self._send(self._taken())
        await self._arrived()
        await self._at_end(
            partial(
                self._client.complete_multipart_upload,
                **self._target,
                **self._upload,
                MultipartUpload={"Parts": self._parts},
            )
        )
        self._upload = None

    def _taken(self) -> bytes:
        part = b"".join(self._part)
        self._part, self._part_bytes = [], 0
        return part

    async def _at_end(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Send what makes the object appear.

        The client sends it again when the answer is lost, and is then refused because of its own first try.
        """
        with named(self._place):
            condition = self._condition
            for wait_seconds in (*_CONFLICT_WAITS_SECONDS, None):
                try:
                    await self._send_last(request, condition)
                except ClientError as error:
                    if code_of(error) not in (_TAKEN | _GONE if condition else _TAKEN):
                        raise
                    again = await self._look_into(error, condition)
                    if again is None:
                        return
                    condition = again
                    if wait_seconds is None:
                        raise OutputTakenError from error
                    if code_of(error) in _CONFLICT:
                        await asyncio.sleep(wait_seconds)
                else:
                    return

    async def _send_last(self, request: Callable[..., Awaitable[Any]], condition: dict[str, str]) -> None:
        if condition and self._conditions.missing:
            await self._after_a_look(request)
            return
        try:
            await request(**condition)
        except ClientError as error:
            if not condition or code_of(error) not in _NO_CONDITIONS | _PERHAPS_NO_CONDITIONS:
                raise
            await self._after_a_look(request)  # fails the same way, if it was something else
            self._conditions.found_missing(self._place)

    async def _after_a_look(self, request: Callable[..., Awaitable[Any]]) -> None:
        """Check the condition, then send without it: that narrows the race, it cannot end it."""
        there = await self._there()
        if (there["ETag"] if there else NOTHING) != self._onto:
            if self._is_marked(there):
                raise DoneElsewhereError
            if there and not self._is_older(there):
                raise OutputTakenError
        await request()

    async def _look_into(self, refusal: ClientError, condition: dict[str, str]) -> dict[str, str] | None:
        """Return the condition of the next try, or None if the object is there and is this upload's.

        Raises DoneElsewhereError or OutputTakenError if another process made it meanwhile. One that was there
        before this upload began was only missing in the listing: it is replaced.
        """
        there = await self._there()
        if there and there.get("Metadata", {}).get(_BY) == self._metadata[_BY]:
            return None
        if self._is_marked(there):
            raise DoneElsewhereError from refusal
        code = code_of(refusal)
        if code == "NoSuchUpload":
            raise OutputTakenError from refusal
        if there is None:
            return {"IfNoneMatch": "*"} if condition else {}
        if condition and self._is_older(there):
            return {"IfMatch": there["ETag"]}
        if code in _CONFLICT:
            return condition
        raise OutputTakenError from refusal

    def _is_marked(self, there: dict[str, Any] | None) -> bool:
        """Return whether what is there was made from the same input."""
        return bool(there and there.get("Metadata", {}).get(MARK) == self._metadata[MARK])

    def _is_older(self, there: dict[str, Any]) -> bool:
        """Return whether the object is older than this upload, by the server's clock alone."""
        now = server_time(there)
        if now is None or "LastModified" not in there:
            return False
        age_seconds: float = (now - there["LastModified"]).total_seconds()
        return age_seconds > time.monotonic() - self._begun + _CLOCK_STEPS_SECONDS

    async def _there(self) -> dict[str, Any] | None:
        try:
            head: dict[str, Any] = await self._client.head_object(**self._target)
        except ClientError as error:
            if code_of(error) in _GONE:
                return None
            raise
        return head

    async def _send(self, part: bytes) -> None:
        if self._upload is None:
            await self._leftovers.end()
            with named(self._place):
                made = await self._client.create_multipart_upload(
                    **self._target, **self._checksums, Metadata=self._metadata
                )
            self._upload = {"UploadId": made["UploadId"]}
        await self._arrived()
        await self._parts_room.take(len(part))
        self._sending = asyncio.create_task(self._send_part(self._upload, len(self._parts) + 1, part))
        self._sending.add_done_callback(partial(_give_back, self._parts_room, len(part)))

    async def _send_part(self, upload: dict[str, str], number: int, part: bytes) -> dict[str, Any]:
        with named(self._place):
            try:
                sent = await self._client.upload_part(
                    **self._target, **upload, **self._checksums, PartNumber=number, Body=part
                )
            except ClientError as error:
                if code_of(error) in _TAKEN:
                    raise OutputTakenError from error
                raise
        arrived = {"PartNumber": number, "ETag": required(sent, "ETag", place=self._place)}
        if self._checksums and "ChecksumCRC32" in sent:
            arrived["ChecksumCRC32"] = sent["ChecksumCRC32"]
        return arrived

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
            try:
                with named(self._place):
                    await self._client.abort_multipart_upload(**self._target, **self._upload)
            except StoreError as failure:
                if "NoSuchUpload" not in str(failure.__cause__):
                    _log.warning(
                        "%s: the unfinished upload could not be aborted: %s", self._place, failure.reason
                    )


def _give_back(room: Room, size_bytes: int, _: object) -> None:
    room.give_back(size_bytes)
