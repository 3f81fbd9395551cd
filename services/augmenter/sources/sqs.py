"""`--sqs-queue-url`: one message, one file; the message is deleted once its file is done.

A message is deleted only if all of it is S3's own events about INPUT (or its test event). Any other is left
in the queue: it belongs to another consumer, or the queue's redrive policy moves it away.
"""

import asyncio
import logging
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

from services.augmenter.metrics import Metrics
from services.augmenter.paths import S3Place
from services.augmenter.runner import Runner
from services.augmenter.sources import s3_events
from services.augmenter.sources.listing import Jobs
from services.augmenter.sources.lru_set import Recent
from services.augmenter.sources.message_lease import MessageGoneError, MessageLease
from services.augmenter.sources.s3_events import Message, Notice, UnreadableMessageError
from services.augmenter.stats import Totals
from services.augmenter.tasks import together
from services.common.file_names import is_input
from services.common.storage.errors import StoreError
from services.common.storage.s3_client import named

_LONG_POLL_SECONDS, _SHORT_POLL_SECONDS = 10, 2
_AGAIN_SECONDS = 5.0
_DEFAULT_VISIBLE_SECONDS = 30  # of SQS; some compatible servers have no attributes
_MAX_LEFT = 10_000  # one that is forgotten is only read once more, and counted twice
# How long a message that is left is hidden from its own consumer, whatever the queue's timeout is. With less,
# a worker would receive it again at once, and the redrive policy would count each time.
_MIN_LEFT_SECONDS, _MAX_LEFT_SECONDS = 5, 60
_RELEASED_TOGETHER = 10  # the maximum of ChangeMessageVisibilityBatch
_log = logging.getLogger("augmenter")


class QueueWorkers:
    """Each worker takes one message at a time, so that no message waits behind a file while others are idle.

    State: `_in_work`, a lock for each file in work: S3 sends an event twice now and then, and the second
    message must find the file done. `_left`, messages that this run does not look into again. `_hidden`, the
    receipt of each message that was left and is still hidden, and until when. `_is_failing`, that the last
    receive failed.
    """

    def __init__(
        self,
        client: Any,
        *,
        queue_url: str,
        source: S3Place,
        jobs: Jobs,
        runner: Runner,
        totals: Totals,
        metrics: Metrics,
    ) -> None:
        self._client = client
        self._queue_url = queue_url
        self._source = source
        self._jobs = jobs
        self._runner = runner
        self._totals = totals
        self._metrics = metrics
        self._visible_seconds = 0
        self._in_work: dict[str, asyncio.Lock] = {}
        self._left = Recent(most=_MAX_LEFT)
        self._hidden: dict[str, tuple[str, float]] = {}
        self._is_failing = False

    async def run(self, *, concurrency: int, endless: bool, stopping: asyncio.Event) -> None:
        """Until `stopping` is set, or, if not `endless`, nothing is left to do. Raises StoreError."""
        with named(self._queue_url):
            got = await self._client.get_queue_attributes(
                QueueUrl=self._queue_url, AttributeNames=["VisibilityTimeout"]
            )
        timeout = got.get("Attributes", {}).get("VisibilityTimeout", _DEFAULT_VISIBLE_SECONDS)
        self._visible_seconds = max(1, int(timeout))
        try:
            await together(self._worker(endless=endless, stopping=stopping) for _ in range(concurrency))
        finally:  # also when the run is stopped
            await self._release_left()

    async def _worker(self, *, endless: bool, stopping: asyncio.Event) -> None:
        passed: set[str] = set()  # left ones, since the last that was ours: there may be others behind them
        while not stopping.is_set():
            try:
                message = await self._receive(_LONG_POLL_SECONDS if endless else _SHORT_POLL_SECONDS)
            except StoreError as error:
                if not endless:
                    raise
                level = logging.DEBUG if self._is_failing else logging.WARNING
                _log.log(level, "%s; receiving again every %.0f s", error, _AGAIN_SECONDS)
                self._is_failing = True
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            if message is None:
                if not endless:
                    return
            elif message["MessageId"] in self._left:
                await self._leave(message)
                if message["MessageId"] in passed:
                    return
                if not endless:
                    passed.add(message["MessageId"])
            elif stopping.is_set():
                await self._lease(message).release()
            else:
                passed.clear()
                await self._take(message, endless=endless)

    async def _receive(self, wait_seconds: int) -> Any:
        """Never cancelled to end it: a message that was on its way would be nobody's for a while."""
        was_failing = self._is_failing
        with named(self._queue_url):
            got = await self._client.receive_message(
                QueueUrl=self._queue_url,
                MaxNumberOfMessages=1,
                WaitTimeSeconds=wait_seconds,
                VisibilityTimeout=self._visible_seconds,  # the queue's own may be 0
            )
        if was_failing:  # a receive that began before another one failed does not say that all is well
            self._is_failing = False
        return next(iter(got.get("Messages", ())), None)

    async def _take(self, received: Any, *, endless: bool) -> None:
        try:
            message = s3_events.read(received["Body"])
        except UnreadableMessageError as error:
            message = Message([], not_understood=str(error))
        ours = [notice for notice in message.notices if self._is_ours(notice)]
        foreign = [notice for notice in message.notices if not self._is_ours(notice)]
        names = self._inputs(notice for notice in ours if notice.starts)
        lease = self._lease(received)
        async with lease:
            done = [await self._do(name) for name in names]
        if not all(done):
            self._count("failed")
            if not endless:  # one try a run, as for a file that was listed
                self._left.add(received["MessageId"])
        elif foreign or message.not_understood:
            self._note_left(received, foreign, message.not_understood)
            await self._leave(received)
        else:
            await lease.delete()
            self._count("deleted")

    def _is_ours(self, notice: Notice) -> bool:
        """Whether the event is about INPUT. The key of another bucket may begin as ours do."""
        if notice.is_test:
            return notice.bucket in {"", self._source.bucket}
        return notice.bucket == self._source.bucket and notice.key.startswith(self._source.key)

    def _inputs(self, notices: Iterable[Notice]) -> list[str]:
        """Return the names of files to augment; the others are counted."""
        names = [self._name(notice) for notice in notices]
        for name in names:
            if not is_input(name):
                self._totals.listing.ignore(name)
        return [name for name in names if is_input(name)]

    def _name(self, notice: Notice) -> str:
        return notice.key.removeprefix(self._source.key)

    def _note_left(self, received: Any, foreign: list[Notice], not_understood: str) -> None:
        """Count a message that is left, and name it; both once."""
        self._left.add(received["MessageId"])
        self._totals.outside += len(foreign)
        self._totals.messages_left += 1
        reason = not_understood or f"not about INPUT: {foreign[0]}"
        if not_understood:
            self._totals.messages_not_understood += 1
        self._count("not_understood" if not_understood else "outside")
        _log.warning(
            "%s: message %s is left in the queue: %s", self._queue_url, received["MessageId"], reason
        )

    def _count(self, outcome: str) -> None:
        self._metrics.messages.labels(outcome=outcome).inc()

    async def _do(self, name: str) -> bool:
        lock = self._in_work.setdefault(name, asyncio.Lock())
        async with lock:
            outcome = await self._runner.do(name, partial(self._jobs.named, name))
        if self._in_work.get(name) is lock and not lock.locked():
            del self._in_work[name]
        return outcome != "failed"

    def _lease(self, received: Any) -> MessageLease:
        return MessageLease(
            self._client, queue_url=self._queue_url, message=received, seconds=self._visible_seconds
        )

    async def _leave(self, received: Any) -> None:
        """Let a message that is not ours be visible again soon, but not at once."""
        seconds = min(max(self._visible_seconds, _MIN_LEFT_SECONDS), _MAX_LEFT_SECONDS)
        now = time.monotonic()
        self._hidden.pop(received["MessageId"], None)
        self._hidden[received["MessageId"]] = received["ReceiptHandle"], now + seconds
        while next(iter(self._hidden.values()))[1] <= now:  # in the order of their times
            del self._hidden[next(iter(self._hidden))]
        if seconds == self._visible_seconds:
            return
        try:
            await self._lease(received).hide(seconds)
        except (MessageGoneError, StoreError) as error:
            _log.debug("%s: message %s: %s", self._queue_url, received["MessageId"], error)

    async def _release_left(self) -> None:
        """Make what was left visible now that no worker of this run would receive it again."""
        now = time.monotonic()
        receipts = [receipt for receipt, until in self._hidden.values() if until > now]
        for start in range(0, len(receipts), _RELEASED_TOGETHER):
            entries = [
                {"Id": str(place), "ReceiptHandle": receipt, "VisibilityTimeout": 0}
                for place, receipt in enumerate(receipts[start : start + _RELEASED_TOGETHER])
            ]
            try:
                with named(self._queue_url):
                    await self._client.change_message_visibility_batch(
                        QueueUrl=self._queue_url, Entries=entries
                    )
            except StoreError as error:  # they are visible after their timeout
                _log.debug("%s", error)
                return
