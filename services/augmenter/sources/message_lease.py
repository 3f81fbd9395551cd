"""The lease of an SQS message: its visibility timeout, renewed while its file is in work."""

import asyncio
import logging
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import ClientError

from services.common.storage.errors import StoreError
from services.common.storage.s3_client import code_of, named
from services.common.tasks import end

# The message was deleted, its timeout passed and another worker has it, or it was held for 12 hours, which
# is the maximum: from then on no renewal can succeed. Codes come with or without a namespace and a dot.
_GONE = {"ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue"}
_log = logging.getLogger("augmenter")


class MessageGoneError(Exception):
    """The message is no longer this worker's."""


class MessageLease:
    """One received message.

    State: `_is_gone`, that the message is no longer ours; `_is_failing`, that the last renewal failed. Only
    the renewal task changes them.
    """

    def __init__(self, client: Any, *, queue_url: str, message: Any, seconds: int) -> None:
        self._client = client
        self._queue_url = queue_url
        self._receipt: str = message["ReceiptHandle"]
        self._place = f"{queue_url}: message {message['MessageId']}"
        self._seconds = seconds
        self._is_gone = False
        self._is_failing = False
        self._renewing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Renew it from now on."""
        self._renewing = asyncio.create_task(self._renew())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Renew it no more; if the work was abandoned, make the message visible at once."""
        if self._renewing is not None:
            await end([self._renewing])
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            await self.release()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._seconds / 3)
            try:
                await self.hide(self._seconds)
            except MessageGoneError as error:
                self._is_gone = True
                _log.warning("%s is not renewed any more, its file goes on: %s", self._place, error)
                return
            except StoreError as error:
                level = logging.DEBUG if self._is_failing else logging.WARNING
                _log.log(level, "%s; trying again", error)
                self._is_failing = True
            else:
                self._is_failing = False

    async def release(self) -> None:
        """Make the message visible to all workers now. It does not fail: else it is visible later."""
        if self._is_gone:
            return
        try:
            await self.hide(0)
        except MessageGoneError as error:
            _log.debug("%s: %s", self._place, error)
        except StoreError as error:
            _log.warning("%s is visible again only after its timeout: %s", self._place, error.reason)

    async def delete(self) -> None:
        """Take the message out of the queue. If that fails, it comes back and its file is found done."""
        try:
            with named(self._place):
                await self._client.delete_message(QueueUrl=self._queue_url, ReceiptHandle=self._receipt)
        except StoreError as error:
            _log.log(logging.DEBUG if self._is_gone else logging.WARNING, "%s", error)

    async def hide(self, seconds: int) -> None:
        """Hide the message from all workers from now on. Raises MessageGoneError or StoreError."""
        with named(self._place):
            try:
                await self._client.change_message_visibility(
                    QueueUrl=self._queue_url, ReceiptHandle=self._receipt, VisibilityTimeout=seconds
                )
            except ClientError as error:
                if code_of(error).rpartition(".")[2] not in _GONE:
                    raise
                raise MessageGoneError(error.response["Error"].get("Message") or code_of(error)) from error
