"""Processes all files, several at a time; each ends as done, skipped or failed."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from services.augmenter.domain import FileTask
from services.augmenter.metrics import Metrics
from services.augmenter.stats import LineCounts, RunStats
from services.common.errors import FileError
from services.common.storage.errors import AlreadyDoneError, FileArchivedError, FileMissingError, StorageError
from services.common.storage.protocol import Storage
from services.common.tasks import cancel_and_wait, gather_or_cancel

_log = logging.getLogger(__name__)
_MAX_QUEUED_FILES = 10_000


class Runner:
    """Passes each file to `process_file`, unless its output exists already, and records the outcome."""

    def __init__(
        self,
        *,
        source: Storage,
        process_file: Callable[[FileTask], Awaitable[LineCounts]],
        stats: RunStats,
        metrics: Metrics,
        log_failures: bool,
        skip_missing: bool = False,
    ) -> None:
        self._source = source
        self._process_file = process_file
        self._stats = stats
        self._metrics = metrics
        self._log_failures = log_failures
        self._skip_missing = skip_missing

    async def run(
        self,
        tasks: AsyncIterator[FileTask],
        *,
        concurrency: int,
        stopping: asyncio.Event,
        on_end: Callable[[FileTask, str], None] | None = None,
    ) -> None:
        """Process all tasks. Once `stopping` is set, only those in progress. Raises StorageError."""
        # The queue is bounded, so that a large listing is not kept in memory as a whole. None ends a worker.
        queue: asyncio.Queue[FileTask | None] = asyncio.Queue(_MAX_QUEUED_FILES)

        async def worker() -> None:
            while task := await queue.get():
                if not stopping.is_set():
                    outcome = await self.process(task.file.name, partial(_return_task, task))
                    if on_end:
                        on_end(task, outcome)
                self._metrics.backlog.dec()

        async def enqueue() -> None:
            enqueuing = asyncio.create_task(self._enqueue_tasks(tasks, queue))
            stop_waiter = asyncio.create_task(stopping.wait())
            # The listing ends by itself, or is cancelled as soon as the run is stopped.
            try:
                await asyncio.wait({enqueuing, stop_waiter}, return_when=asyncio.FIRST_COMPLETED)
                if enqueuing.done():
                    enqueuing.result()
            finally:
                await cancel_and_wait([enqueuing, stop_waiter])
            for _ in range(concurrency):
                await queue.put(None)

        await gather_or_cancel([enqueue(), *(worker() for _ in range(concurrency))])

    async def _enqueue_tasks(
        self, tasks: AsyncIterator[FileTask], queue: asyncio.Queue[FileTask | None]
    ) -> None:
        async for task in tasks:
            self.on_found(task)
            await queue.put(task)

    def on_found(self, task: FileTask) -> None:
        """Count a file that is going to be processed."""
        self._stats.files_found += 1
        self._stats.bytes_found += task.file.size_bytes
        self._metrics.backlog.inc()

    async def process(self, name: str, find_task: Callable[[], Awaitable[FileTask]]) -> str:
        """Process one file, record any failure and return the outcome: done, skipped or failed."""
        uri = self._source.uri(name)
        started = time.monotonic()
        outcome = "failed"
        try:
            outcome = await self._process(uri, await find_task())
        except AlreadyDoneError:
            self._stats.files_skipped += 1
            outcome = "skipped"
        except FileArchivedError:
            self._skip_archived(uri)
            outcome = "skipped"
        except FileMissingError as error:
            # Only INPUT's object counts as missing, not one of OUTPUT.
            if self._skip_missing and error.uri == uri:
                self._stats.files_missing += 1
                self._stats.files_skipped += 1
                outcome = "skipped"
                _log.info("%s: gone before it was read; skipped", uri)
            else:
                self._record_failure(uri, _reason_without_uri(error, uri))
        except StorageError as error:
            self._record_failure(uri, _reason_without_uri(error, uri))
        except FileError as error:
            self._record_failure(uri, str(error))
        except Exception as error:  # noqa: BLE001 - a defect met in one file must not cost the others
            # A defect that shows in one file must not fail the others.
            _log.exception("%s: unexpected failure", uri)
            self._record_failure(uri, f"unexpected {type(error).__name__}; see the log")
        else:
            self._stats.failures.mark_resolved(uri)
        self._metrics.file_seconds.observe(time.monotonic() - started)
        self._metrics.files.labels(outcome=outcome).inc()
        return outcome

    async def _process(self, uri: str, task: FileTask) -> str:
        if task.error:
            raise task.error
        if task.is_done:
            self._stats.files_skipped += 1
            self._stats.bytes_found -= task.file.size_bytes
            return "skipped"
        if task.file.is_archived:
            raise FileArchivedError(uri=uri, reason="in cold storage")
        counts = await self._process_file(task)
        self._stats.files_done += 1
        self._stats.lines.add(counts)
        self._metrics.lines.labels(outcome="augmented").inc(counts.augmented)
        self._metrics.lines.labels(outcome="rejected").inc(counts.rejected)
        self._metrics.lines.labels(outcome="blank").inc(counts.blank)
        self._metrics.existing_levels.labels(outcome="replaced").inc(counts.replaced)
        self._metrics.existing_levels.labels(outcome="kept").inc(counts.kept)
        _log.debug("%s: done, %d lines", uri, counts.read)
        return "done"

    def _skip_archived(self, uri: str) -> None:
        level = logging.DEBUG if self._stats.files_archived else logging.WARNING
        _log.log(level, "%s: in cold storage and not restored; skipped (others like it are counted)", uri)
        self._stats.files_archived += 1
        self._stats.files_skipped += 1
        self._metrics.archived_files.inc()

    def _record_failure(self, uri: str, reason: str) -> None:
        """Record and log a failure. A file that fails again for the same reason is logged at debug."""
        is_known = self._stats.failures.reasons_by_file.get(uri) == reason
        named_at_the_end = self._stats.failures.add(uri, reason)
        if self._log_failures or not named_at_the_end:
            _log.log(logging.DEBUG if is_known else logging.WARNING, "%s: %s", uri, reason)


async def _return_task(task: FileTask) -> FileTask:
    return task


def _reason_without_uri(error: StorageError, uri: str) -> str:
    """Return why the file failed. The message names the file already, so its URI is not repeated."""
    return error.reason if error.uri == uri else str(error)
