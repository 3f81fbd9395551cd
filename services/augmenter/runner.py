"""All files: several in work at a time, each ended as done, skipped or failed."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from services.augmenter.metrics import Metrics
from services.augmenter.sources.listing import Job
from services.augmenter.stats import LineCounts, Totals
from services.augmenter.tasks import together
from services.common.errors import FileError
from services.common.storage.errors import ArchivedError, DoneElsewhereError, MissingError, StoreError
from services.common.storage.protocol import Store
from services.common.tasks import end

_log = logging.getLogger("augmenter")
_FILES_KNOWN_AHEAD = 10_000


class Runner:
    """Gives each job to `work`, unless its output is there already."""

    def __init__(
        self,
        *,
        source: Store,
        work: Callable[[Job], Awaitable[LineCounts]],
        totals: Totals,
        metrics: Metrics,
        tell_failures: bool,
        skip_missing: bool = False,
    ) -> None:
        self._source = source
        self._work = work
        self._totals = totals
        self._metrics = metrics
        self._tell_failures = tell_failures
        self._skip_missing = skip_missing

    async def run(
        self,
        jobs: AsyncIterator[Job],
        *,
        concurrency: int,
        stopping: asyncio.Event,
        ended: Callable[[Job, str], None] | None = None,
    ) -> None:
        """Do all jobs; once `stopping` is set, only those in work. StoreError: INPUT cannot be listed."""
        known: asyncio.Queue[Job | None] = asyncio.Queue(_FILES_KNOWN_AHEAD)

        async def worker() -> None:
            while job := await known.get():
                if not stopping.is_set():
                    outcome = await self.do(job.item.name, partial(_ready, job))
                    if ended:
                        ended(job, outcome)
                self._metrics.backlog.dec()

        async def find() -> None:
            finding = asyncio.create_task(self._find(jobs, known))
            stop = asyncio.create_task(stopping.wait())
            try:
                await asyncio.wait({finding, stop}, return_when=asyncio.FIRST_COMPLETED)
                if finding.done():
                    finding.result()
            finally:
                await end([finding, stop])
            for _ in range(concurrency):
                await known.put(None)

        await together([find(), *(worker() for _ in range(concurrency))])

    async def _find(self, jobs: AsyncIterator[Job], known: asyncio.Queue[Job | None]) -> None:
        async for job in jobs:
            self.found(job)
            await known.put(job)

    def found(self, job: Job) -> None:
        """Count a job that is going to be done."""
        self._totals.files_found += 1
        self._totals.bytes_found += job.item.size_bytes
        self._metrics.backlog.inc()

    async def do(self, name: str, find: Callable[[], Awaitable[Job]]) -> str:
        """Do one file; how it ended. A failure is noted."""
        place = self._source.place(name)
        started = time.monotonic()
        outcome = "failed"
        try:
            outcome = await self._one(place, await find())
        except DoneElsewhereError:
            self._totals.skipped += 1
            outcome = "skipped"
        except ArchivedError:
            self._skip_archived(place)
            outcome = "skipped"
        except MissingError as error:
            if self._skip_missing and error.place == place:  # not if it is OUTPUT that is gone
                self._totals.missing += 1
                self._totals.skipped += 1
                outcome = "skipped"
                _log.info("%s: gone before it was read; skipped", place)
            else:
                self._failed(place, _reason(error, place))
        except StoreError as error:
            self._failed(place, _reason(error, place))
        except FileError as error:
            self._failed(place, str(error))
        except Exception as error:  # noqa: BLE001 - a defect met in one file must not cost the others
            _log.exception("%s: unexpected failure", place)
            self._failed(place, f"unexpected {type(error).__name__}; the log says where")
        else:
            self._totals.failures.over(place)
        self._metrics.file_seconds.observe(time.monotonic() - started)
        self._metrics.files.labels(outcome=outcome).inc()
        return outcome

    async def _one(self, place: str, job: Job) -> str:
        if job.failure:
            raise job.failure
        if job.is_done:
            self._totals.skipped += 1
            self._totals.bytes_found -= job.item.size_bytes
            return "skipped"
        if job.item.is_archived:
            raise ArchivedError(place=place, reason="in cold storage")
        counts = await self._work(job)
        self._totals.done += 1
        self._totals.lines.add(counts)
        self._metrics.lines.labels(outcome="augmented").inc(counts.augmented)
        self._metrics.lines.labels(outcome="rejected").inc(counts.rejected)
        self._metrics.lines.labels(outcome="blank").inc(counts.blank)
        self._metrics.existing_levels.labels(outcome="replaced").inc(counts.replaced)
        self._metrics.existing_levels.labels(outcome="kept").inc(counts.kept)
        _log.debug("%s: done, %d lines", place, counts.read)
        return "done"

    def _skip_archived(self, place: str) -> None:
        level = logging.DEBUG if self._totals.archived else logging.WARNING
        _log.log(level, "%s: in cold storage and not restored; skipped (others like it are counted)", place)
        self._totals.archived += 1
        self._totals.skipped += 1
        self._metrics.archived.inc()

    def _failed(self, place: str, why: str) -> None:
        """Note a failure. A file that fails again as it did before is logged at debug."""
        is_known = self._totals.failures.named.get(place) == why
        named_at_the_end = self._totals.failures.add(place, why)
        if self._tell_failures or not named_at_the_end:
            _log.log(logging.DEBUG if is_known else logging.WARNING, "%s: %s", place, why)


async def _ready(job: Job) -> Job:
    return job


def _reason(error: StoreError, place: str) -> str:
    """Return why the file failed, which is named beside it: its own place only once."""
    return error.reason if error.place == place else str(error)
