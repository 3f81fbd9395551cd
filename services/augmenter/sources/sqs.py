"""`--sqs-queue-url`: each message names a file, and is deleted once that file is done.

A message is deleted only if all of its events are S3's own events about INPUT, or its test event. Any other
message is left in the queue: it belongs to another consumer, or the queue's redrive policy moves it away.
"""

import asyncio
import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

from services.augmenter.metrics import Metrics
from services.augmenter.paths import S3Uri
from services.augmenter.runner import Runner
from services.augmenter.sources import s3_events
from services.augmenter.sources.hidden_messages import HiddenMessages
from services.augmenter.sources.listing import FileLister
from services.augmenter.sources.lru_set import LruSet
from services.augmenter.sources.message_lease import MessageLease
from services.augmenter.sources.s3_events import EventMessage, ObjectEvent, UnreadableMessageError
from services.augmenter.stats import RunStats
from services.common.file_names import is_input
from services.common.storage.errors import StorageError
from services.common.storage.s3_client import translate_errors
from services.common.tasks import gather_or_cancel

_LONG_POLL_SECONDS = 10
_SHORT_POLL_SECONDS = 2
_RETRY_SECONDS = 5.0
# SQS's default. Some compatible servers have no queue attributes.
_DEFAULT_VISIBILITY_SECONDS = 30
# A message that is dropped from this set is only read once more, and counted twice.
_MAX_IGNORED_MESSAGES = 10_000
_log = logging.getLogger(__name__)


class SqsWorkers:
    """Workers that take one message at a time, so that no message waits for a file while a worker is idle.

    State:

    - `_file_locks`, one for each file in progress: S3 sends some events twice, and the worker of the second
      message must find the file done.
    - `_ignored_ids`, messages that this run does not process again.
    - `_hidden`, messages that were left in the queue and are still hidden.
    - `_receive_failing`, that the last receive failed.
    """

    def __init__(
        self,
        client: Any,
        *,
        queue_url: str,
        source: S3Uri,
        lister: FileLister,
        runner: Runner,
        stats: RunStats,
        metrics: Metrics,
    ) -> None:
        self._client = client
        self._queue_url = queue_url
        self._source = source
        self._lister = lister
        self._runner = runner
        self._stats = stats
        self._metrics = metrics
        self._visibility_seconds = 0
        self._file_locks: dict[str, asyncio.Lock] = {}
        self._ignored_ids = LruSet(max_size=_MAX_IGNORED_MESSAGES)
        self._hidden = HiddenMessages(client, queue_url=queue_url)
        self._receive_failing = False

    async def run(self, *, concurrency: int, follow: bool, stopping: asyncio.Event) -> None:
        """Process messages until `stopping` is set or, without `follow`, none is left.

        Raises StorageError.
        """
        with translate_errors(self._queue_url):
            response = await self._client.get_queue_attributes(
                QueueUrl=self._queue_url, AttributeNames=["VisibilityTimeout"]
            )
        timeout = response.get("Attributes", {}).get("VisibilityTimeout", _DEFAULT_VISIBILITY_SECONDS)
        self._visibility_seconds = max(1, int(timeout))
        try:
            await gather_or_cancel(self._worker(follow=follow, stopping=stopping) for _ in range(concurrency))
        finally:
            # Messages that were left become visible again also when the run is stopped.
            await self._hidden.release()

    async def _worker(self, *, follow: bool, stopping: asyncio.Event) -> None:
        # Ignored messages received since the last one that was processed. A run without `follow` ends when
        # one of them comes a second time: only then has the queue no other messages.
        seen: set[str] = set()
        while not stopping.is_set():
            try:
                message = await self._receive(_LONG_POLL_SECONDS if follow else _SHORT_POLL_SECONDS)
            except StorageError as error:
                if not follow:
                    raise
                level = logging.DEBUG if self._receive_failing else logging.WARNING
                _log.log(level, "%s; receiving again every %.0f s", error, _RETRY_SECONDS)
                self._receive_failing = True
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if message is None:
                if not follow:
                    return
            elif message["MessageId"] in self._ignored_ids:
                await self._hidden.hide(message, self._create_lease(message))
                if message["MessageId"] in seen:
                    return
                if not follow:
                    seen.add(message["MessageId"])
            elif stopping.is_set():
                await self._create_lease(message).release()
            else:
                seen.clear()
                await self._process_message(message, follow=follow)

    async def _receive(self, wait_seconds: int) -> Any:
        """Return the next message, or None after `wait_seconds`.

        A receive is never cancelled when a run ends: a message on its way would stay hidden until its
        timeout.
        """
        was_failing = self._receive_failing
        with translate_errors(self._queue_url):
            response = await self._client.receive_message(
                QueueUrl=self._queue_url,
                MaxNumberOfMessages=1,
                WaitTimeSeconds=wait_seconds,
                # The queue's own timeout may be 0.
                VisibilityTimeout=self._visibility_seconds,
            )
        # A receive that began before another one failed does not prove that the queue has recovered.
        if was_failing:
            self._receive_failing = False
        return next(iter(response.get("Messages", ())), None)

    async def _process_message(self, received: Any, *, follow: bool) -> None:
        try:
            message = s3_events.parse_message(received["Body"])
        except UnreadableMessageError as error:
            message = EventMessage([], unreadable_reason=str(error))
        ours = [event for event in message.events if self._is_about_input(event)]
        foreign = [event for event in message.events if not self._is_about_input(event)]
        names = self._input_names(event for event in ours if event.is_readable)
        lease = self._create_lease(received)
        async with lease:
            done = [await self._process_file(name) for name in names]
        if not all(done):
            self._count_message("failed")
            # Without `follow`, a file is tried once, as in a run that lists its files.
            if not follow:
                self._ignored_ids.add(received["MessageId"])
        elif foreign or message.unreadable_reason:
            self._record_foreign(received, foreign, message.unreadable_reason)
            await self._hidden.hide(received, lease)
        else:
            await lease.delete()
            self._count_message("deleted")

    def _is_about_input(self, event: ObjectEvent) -> bool:
        """Return whether the event is about INPUT. A key of another bucket may have the same prefix."""
        if event.is_test:
            return event.bucket in {"", self._source.bucket}
        return event.bucket == self._source.bucket and event.key.startswith(self._source.key)

    def _input_names(self, events: Iterable[ObjectEvent]) -> list[str]:
        """Return the names of files to augment, and count the other names as ignored."""
        names = [self._name(event) for event in events]
        for name in names:
            if not is_input(name):
                self._stats.input_names.count_ignored(name)
        return [name for name in names if is_input(name)]

    def _name(self, event: ObjectEvent) -> str:
        return event.key.removeprefix(self._source.key)

    def _record_foreign(self, received: Any, foreign: list[ObjectEvent], unreadable_reason: str) -> None:
        """Count and log a message that is left in the queue. Both happen once for each message."""
        self._ignored_ids.add(received["MessageId"])
        self._stats.foreign_keys += len(foreign)
        self._stats.messages_left += 1
        reason = unreadable_reason or f"not about INPUT: {foreign[0]}"
        if unreadable_reason:
            self._stats.messages_not_understood += 1
        self._count_message("not_understood" if unreadable_reason else "outside")
        _log.warning(
            "%s: message %s is left in the queue: %s", self._queue_url, received["MessageId"], reason
        )

    def _count_message(self, outcome: str) -> None:
        self._metrics.queue_messages.labels(outcome=outcome).inc()

    async def _process_file(self, name: str) -> bool:
        lock = self._file_locks.setdefault(name, asyncio.Lock())
        async with lock:
            outcome = await self._runner.process(name, partial(self._lister.find_task, name))
        if self._file_locks.get(name) is lock and not lock.locked():
            del self._file_locks[name]
        return outcome != "failed"

    def _create_lease(self, received: Any) -> MessageLease:
        return MessageLease(
            self._client,
            queue_url=self._queue_url,
            message=received,
            visibility_seconds=self._visibility_seconds,
        )
