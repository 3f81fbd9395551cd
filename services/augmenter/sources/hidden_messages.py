"""Messages of an SQS queue that a run leaves to other consumers, hidden for a short time."""

import logging
import time
from typing import Any

from services.augmenter.sources.message_lease import MessageLease, MessageLeaseLostError
from services.common.storage.errors import StorageError
from services.common.storage.s3_client import translate_errors

# How long a message that is left is hidden from its own consumer, whatever the queue's timeout is. After less
# time, a worker would receive it again at once, and each time would count for the redrive policy.
_MIN_HIDDEN_SECONDS = 5
_MAX_HIDDEN_SECONDS = 60
# The maximum of ChangeMessageVisibilityBatch.
_RELEASE_BATCH_SIZE = 10
_log = logging.getLogger(__name__)


class HiddenMessages:
    """Messages that were left in the queue, until they are visible again.

    State: `_messages`, the receipt of each message that is hidden, and until when, in the order of these
    times.
    """

    def __init__(self, client: Any, *, queue_url: str) -> None:
        self._client = client
        self._queue_url = queue_url
        self._messages: dict[str, tuple[str, float]] = {}

    async def hide(self, received: Any, lease: MessageLease) -> None:
        """Hide a message that is left in the queue for a short time."""
        seconds = min(max(lease.visibility_seconds, _MIN_HIDDEN_SECONDS), _MAX_HIDDEN_SECONDS)
        now = time.monotonic()
        self._messages.pop(received["MessageId"], None)
        self._messages[received["MessageId"]] = received["ReceiptHandle"], now + seconds
        # Drop messages that are visible again.
        while next(iter(self._messages.values()))[1] <= now:
            del self._messages[next(iter(self._messages))]
        if seconds == lease.visibility_seconds:
            return
        try:
            await lease.set_visibility(seconds)
        except (MessageLeaseLostError, StorageError) as error:
            _log.debug("%s: message %s: %s", self._queue_url, received["MessageId"], error)

    async def release(self) -> None:
        """Make the messages visible, now that no worker of this run would receive them again."""
        now = time.monotonic()
        receipts = [receipt for receipt, until in self._messages.values() if until > now]
        for start in range(0, len(receipts), _RELEASE_BATCH_SIZE):
            entries = [
                {"Id": str(number), "ReceiptHandle": receipt, "VisibilityTimeout": 0}
                for number, receipt in enumerate(receipts[start : start + _RELEASE_BATCH_SIZE])
            ]
            try:
                with translate_errors(self._queue_url):
                    await self._client.change_message_visibility_batch(
                        QueueUrl=self._queue_url, Entries=entries
                    )
            except StorageError as error:
                # The messages become visible after their timeout anyway.
                _log.debug("%s", error)
                return
