"""All files: several in work at a time, each ended as done, skipped or failed."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from services.augmenter.metrics import Metrics
from services.augmenter.sources.listing import FileTask
from services.augmenter.stats import LineCounts, RunStats
from services.common.errors import FileError
from services.common.storage.errors import AlreadyDoneError, FileArchivedError, FileMissingError, StorageError
from services.common.storage.protocol import Storage
from services.common.tasks import cancel_and_wait, gather_or_cancel

_log = logging.getLogger("augmenter")
_MAX_QUEUED_FILES = 10_000


class Runner:
    """Gives each job to `work`, unless its output is there already."""

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
        """Do all jobs; once `stopping` is set, only those in work. StoreError: INPUT cannot be listed."""
        known: asyncio.Queue[FileTask | None] = asyncio.Queue(_MAX_QUEUED_FILES)

        async def worker() -> None:
            while job := await known.get():
                if not stopping.is_set():
                    outcome = await self.process(job.file.name, partial(_return_task, job))
                    if on_end:
                        on_end(job, outcome)
                self._metrics.backlog.dec()

        async def find() -> None:
            finding = asyncio.create_task(self._enqueue_tasks(tasks, known))
            stop = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait({finding, stop}, return_when=asyncio.FIRST_COMPLETED)
                if finding.done():
                    finding.result()
            finally:
                await cancel_and_wait([finding, stop])
            for _ in range(concurrency):
                await known.put(None)

        await gather_or_cancel([find(), *(worker() for _ in range(concurrency))])

    async def _enqueue_tasks(
        self, tasks: AsyncIterator[FileTask], queue: asyncio.Queue[FileTask | None]
    ) -> None:
        async for job in tasks:
            self.on_found(job)
            await queue.put(job)

    def on_found(self, task: FileTask) -> None:
        """Count a job that is going to be done."""
        self._stats.files_found += 1
        self._stats.bytes_found += task.file.size_bytes
        self._metrics.backlog.inc()

    async def process(self, name: str, find_task: Callable[[], Awaitable[FileTask]]) -> str:
        """Do one file; how it ended. A failure is noted."""
        place = self._source.uri(name)
        started = time.monotonic()
        outcome = "failed"
        try:
            outcome = await self._process(place, await find_task())
        except AlreadyDoneError:
            self._stats.files_skipped += 1
            outcome = "skipped"
        except FileArchivedError:
            self._skip_archived(place)
            outcome = "skipped"
        except FileMissingError as error:
            if self._skip_missing and error.uri == place:  # not if it is OUTPUT that is gone
                self._stats.files_missing += 1
                self._stats.files_skipped += 1
                outcome = "skipped"
                _log.info("%s: gone before it was read; skipped", place)
            else:
                self._record_failure(place, _reason_without_uri(error, place))
        except StorageError as error:
            self._record_failure(place, _reason_without_uri(error, place))
        except FileError as error:
            self._record_failure(place, str(error))
        except Exception as error:  # noqa: BLE001 - a defect met in one file must not cost the others
            _log.exception("%s: unexpected failure", place)
            self._record_failure(place, f"unexpected {type(error).__name__}; the log says where")
        else:
            self._stats.failures.mark_resolved(place)
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
        """Note a failure. A file that fails again as it did before is logged at debug."""
        is_known = self._stats.failures.reasons_by_file.get(uri) == reason
        named_at_the_end = self._stats.failures.add(uri, reason)
        if self._log_failures or not named_at_the_end:
            _log.log(logging.DEBUG if is_known else logging.WARNING, "%s: %s", uri, reason)


async def _return_task(task: FileTask) -> FileTask:
    return task


def _reason_without_uri(error: StorageError, uri: str) -> str:
    """Return why the file failed, which is named beside it: its own place only once."""
    return error.reason if error.uri == uri else str(error)
