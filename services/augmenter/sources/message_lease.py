"""The lease of an SQS message: its visibility timeout, extended while its file is in progress."""

import asyncio
import logging
from types import TracebackType
from typing import Any, Self

from botocore.exceptions import ClientError

from services.common.aws_errors import error_code
from services.common.storage.errors import StorageError
from services.common.storage.s3_client import translate_errors
from services.common.tasks import cancel_and_wait

# From the following errors on, no extension can succeed: the message was deleted, its timeout passed and
# another worker has it, or it was held for 12 hours, the maximum. Codes come with or without a namespace and
# a dot.
_LOST_CODES = {"ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue"}
_log = logging.getLogger(__name__)


class MessageLeaseLostError(Exception):
    """The message no longer belongs to this worker."""


class MessageLease:
    """The lease of one received message.

    State: `_is_lost`, that the message no longer belongs to this worker; `_extend_failing`, that the last
    extension failed. Only `_extend_task` changes them.
    """

    def __init__(self, client: Any, *, queue_url: str, message: Any, visibility_seconds: int) -> None:
        self._client = client
        self._queue_url = queue_url
        self._receipt: str = message["ReceiptHandle"]
        self._description = f"{queue_url}: message {message['MessageId']}"
        self.visibility_seconds = visibility_seconds
        self._is_lost = False
        self._extend_failing = False
        self._extend_task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to extend the lease periodically."""
        self._extend_task = asyncio.create_task(self._extend_loop())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop extending the lease. If the work was cancelled, make the message visible at once."""
        if self._extend_task is not None:
            await cancel_and_wait([self._extend_task])
        if kind is not None and issubclass(kind, asyncio.CancelledError):
            await self.release()

    async def _extend_loop(self) -> None:
        while True:
            await asyncio.sleep(self.visibility_seconds / 3)
            try:
                await self.set_visibility(self.visibility_seconds)
            except MessageLeaseLostError as error:
                self._is_lost = True
                _log.warning("%s is not renewed any more, its file goes on: %s", self._description, error)
                return
            except StorageError as error:
                level = logging.DEBUG if self._extend_failing else logging.WARNING
                _log.log(level, "%s; trying again", error)
                self._extend_failing = True
            else:
                self._extend_failing = False

    async def release(self) -> None:
        """Make the message visible to all workers now.

        Never raises: if the call fails, the message becomes visible after its timeout.
        """
        if self._is_lost:
            return
        try:
            await self.set_visibility(0)
        except MessageLeaseLostError as error:
            _log.debug("%s: %s", self._description, error)
        except StorageError as error:
            _log.warning("%s is visible again only after its timeout: %s", self._description, error.reason)

    async def delete(self) -> None:
        """Delete the message from the queue.

        Never raises: if the call fails, the message comes back, and its file is found to be done.
        """
        try:
            with translate_errors(self._description):
                await self._client.delete_message(QueueUrl=self._queue_url, ReceiptHandle=self._receipt)
        except StorageError as error:
            _log.log(logging.DEBUG if self._is_lost else logging.WARNING, "%s", error)

    async def set_visibility(self, seconds: int) -> None:
        """Hide the message from all workers for so many seconds from now on.

        Raises MessageLeaseLostError or StorageError.
        """
        with translate_errors(self._description):
            try:
                await self._client.change_message_visibility(
                    QueueUrl=self._queue_url, ReceiptHandle=self._receipt, VisibilityTimeout=seconds
                )
            except ClientError as error:
                if error_code(error).rpartition(".")[2] not in _LOST_CODES:
                    raise
                raise MessageLeaseLostError(
                    error.response["Error"].get("Message") or error_code(error)
                ) from error
