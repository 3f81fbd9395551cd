"""`--sqs-queue-url`: one message, one file; a message goes when its file is done, else it comes back."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from services.augmenter import notices
from services.augmenter.errors import StoreError
from services.augmenter.jobs import Jobs
from services.augmenter.locations import S3Place
from services.augmenter.notices import Notice, UnreadableMessageError
from services.augmenter.object_store.protocol import is_input
from services.augmenter.object_store.s3_client import named
from services.augmenter.recent import Recent
from services.augmenter.runner import Runner
from services.augmenter.tasks import together
from services.augmenter.totals import Totals
from services.common.endings import end

_LONG_POLL_SECONDS, _SHORT_POLL_SECONDS = 10, 2
_AGAIN_SECONDS = 5.0
_MOST_LEFT = 10_000  # one that is forgotten is only looked into again, and counted twice
_log = logging.getLogger("augmenter")


class QueueWorkers:
    """Each takes one message at a time, so that no message waits behind a file while others are idle.

    State: `_in_work`, a lock for each file in work: S3 tells of an object twice now and then, and the second
    time has to find it done. `_left`, messages that are not ours to take out of the queue.
    """

    def __init__(
        self, client: Any, *, queue_url: str, source: S3Place, jobs: Jobs, runner: Runner, totals: Totals
    ) -> None:
        self._client = client
        self._queue_url = queue_url
        self._source = source
        self._jobs = jobs
        self._runner = runner
        self._totals = totals
        self._visible_seconds = 0
        self._in_work: dict[str, asyncio.Lock] = {}
        self._left = Recent(most=_MOST_LEFT)

    async def run(self, *, concurrency: int, endless: bool, stopping: asyncio.Event) -> None:
        """Until `stopping` is set, or, if not `endless`, the queue is empty. Raises StoreError."""
        with named(self._queue_url):
            got = await self._client.get_queue_attributes(
                QueueUrl=self._queue_url, AttributeNames=["VisibilityTimeout"]
            )
        self._visible_seconds = max(1, int(got["Attributes"]["VisibilityTimeout"]))
        await together(self._worker(endless=endless, stopping=stopping) for _ in range(concurrency))

    async def _worker(self, *, endless: bool, stopping: asyncio.Event) -> None:
        passed: set[str] = set()  # left ones, since the last that was ours: there may be others behind them
        while not stopping.is_set():
            try:
                message = await self._receive(_LONG_POLL_SECONDS if endless else _SHORT_POLL_SECONDS)
            except StoreError as error:
                if not endless:
                    raise
                _log.warning("%s; asking again in %.0f s", error, _AGAIN_SECONDS)
                await asyncio.sleep(_AGAIN_SECONDS)
                continue
            if message is None or message["MessageId"] in passed:
                if not endless:
                    return
            elif message["MessageId"] in self._left:
                if not endless:
                    passed.add(message["MessageId"])
            elif stopping.is_set():
                await self._show_again(message)
            else:
                passed.clear()
                await self._take(message)

    async def _receive(self, wait_seconds: int) -> Any:
        """Never cancelled to end it: a message that was on its way would be nobody's for a while."""
        with named(self._queue_url):
            got = await self._client.receive_message(
                QueueUrl=self._queue_url, MaxNumberOfMessages=1, WaitTimeSeconds=wait_seconds
            )
        return next(iter(got.get("Messages", ())), None)

    async def _take(self, message: Any) -> None:
        try:
            told = notices.read(message["Body"])
        except UnreadableMessageError as error:  # it comes back until the queue's redrive takes it away
            self._left.add(message["MessageId"])
            self._totals.failures.add(f"{self._queue_url} message {message['MessageId']}", str(error))
            _log.warning("%s: message %s: %s", self._queue_url, message["MessageId"], error)
            return
        names = [name for notice in told if (name := self._name(notice)) is not None]
        outside = len(told) - len(names)
        async with self._kept(message):
            done = [await self._do(name) for name in names if is_input(name)]
        if outside:
            self._left.add(message["MessageId"])
            self._totals.outside += outside
        elif all(done):
            await self._delete(message)

    def _name(self, notice: Notice) -> str | None:
        """The file's name in INPUT; None if it is somewhere else."""
        if notice.bucket != self._source.bucket or not notice.key.startswith(self._source.key):
            return None
        return notice.key.removeprefix(self._source.key)

    async def _do(self, name: str) -> bool:
        lock = self._in_work.setdefault(name, asyncio.Lock())
        async with lock:
            outcome = await self._runner.do(name, partial(self._jobs.named, name))
        if self._in_work.get(name) is lock and not lock.locked():
            del self._in_work[name]
        return outcome != "failed"

    @asynccontextmanager
    async def _kept(self, message: Any) -> AsyncIterator[None]:
        """Keep the message from everybody else; if the work is abandoned, it is there again at once."""
        keeping = asyncio.create_task(self._keep(message))
        try:
            yield
        except asyncio.CancelledError:
            await end([keeping])
            await self._show_again(message)
            raise
        finally:
            await end([keeping])

    async def _keep(self, message: Any) -> None:
        while True:
            await asyncio.sleep(self._visible_seconds / 3)
            try:
                await self._hide(message, self._visible_seconds)
            except StoreError as error:
                _log.warning("%s; trying again", error)

    async def _show_again(self, message: Any) -> None:
        try:
            await self._hide(message, 0)
        except StoreError as error:
            _log.warning(
                "%s: message %s is seen again later: %s", self._queue_url, message["MessageId"], error
            )

    async def _delete(self, message: Any) -> None:
        try:
            with named(self._queue_url):
                await self._client.delete_message(
                    QueueUrl=self._queue_url, ReceiptHandle=message["ReceiptHandle"]
                )
        except StoreError as error:  # it comes back, and finds its file done
            _log.warning("%s", error)

    async def _hide(self, message: Any, seconds: int) -> None:
        with named(self._queue_url):
            await self._client.change_message_visibility(
                QueueUrl=self._queue_url, ReceiptHandle=message["ReceiptHandle"], VisibilityTimeout=seconds
            )
