"""All files: found, several in work at a time, each ended as done, skipped or failed."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from services.augmenter.metrics import Metrics
from services.augmenter.object_store.protocol import Item, Store
from services.augmenter.tasks import together
from services.augmenter.totals import LineCounts, Totals
from services.common.codec import Format, format_of
from services.common.errors import FileError

_log = logging.getLogger("augmenter")
_FILES_KNOWN_AHEAD = 10_000


@dataclass(frozen=True, slots=True)
class Job:
    """One file to do, and where its output goes."""

    item: Item
    output_name: str
    lines_format: Format


class Runner:
    """Gives each job to `work`, unless its output is there already."""

    def __init__(
        self,
        *,
        source: Store,
        sink: Store,
        overwrite: bool,
        work: Callable[[Job], Awaitable[LineCounts]],
        totals: Totals,
        metrics: Metrics,
    ) -> None:
        self._source = source
        self._sink = sink
        self._overwrite = overwrite
        self._work = work
        self._totals = totals
        self._metrics = metrics

    async def run(self, jobs: AsyncIterator[Job], *, concurrency: int) -> None:
        """Do all jobs. A file's failure is noted; StoreError means that INPUT cannot be listed."""
        known: asyncio.Queue[Job | None] = asyncio.Queue(_FILES_KNOWN_AHEAD)
        await together(
            [self._find(jobs, known, concurrency), *(self._worker(known) for _ in range(concurrency))]
        )

    async def _find(self, jobs: AsyncIterator[Job], known: asyncio.Queue[Job | None], workers: int) -> None:
        async for job in jobs:
            self._totals.files_found += 1
            self._totals.bytes_found += job.item.size_bytes
            self._metrics.backlog.inc()
            await known.put(job)
        for _ in range(workers):
            await known.put(None)

    async def _worker(self, known: asyncio.Queue[Job | None]) -> None:
        while job := await known.get():
            started = time.monotonic()
            outcome = await self._one(job)
            self._metrics.file_seconds.observe(time.monotonic() - started)
            self._metrics.files.labels(outcome=outcome).inc()
            self._metrics.backlog.dec()

    async def _one(self, job: Job) -> str:
        place = self._source.place(job.item.name)
        try:
            if not self._overwrite and await self._sink.is_made_from(job.output_name, job.item):
                self._totals.skipped += 1
                self._totals.bytes_found -= job.item.size_bytes
                return "skipped"
            counts = await self._work(job)
        except FileError as error:
            self._totals.failures.append((place, str(error)))
        except Exception as error:  # noqa: BLE001 - a defect met in one file must not cost the others
            _log.exception("%s: unexpected failure", place)
            self._totals.failures.append((place, f"unexpected {type(error).__name__}: {error}"))
        else:
            self._totals.done += 1
            self._totals.lines.add(counts)
            self._metrics.lines.labels(outcome="augmented").inc(counts.augmented)
            self._metrics.lines.labels(outcome="rejected").inc(counts.rejected)
            self._metrics.lines.labels(outcome="blank").inc(counts.blank)
            _log.debug("%s: done, %d lines", place, counts.read)
            return "done"
        return "failed"


async def find_jobs(source: Store, *, input_name: str | None, output_name: str | None) -> AsyncIterator[Job]:
    """Every file of INPUT; or the one that it is."""
    items = source.list() if input_name is None else _single(source, input_name)
    async for item in items:
        lines_format = format_of(item.name)
        if lines_format is not None:
            yield Job(item, output_name or item.name, lines_format)


async def _single(source: Store, name: str) -> AsyncIterator[Item]:
    yield await source.find(name)
