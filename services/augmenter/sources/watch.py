"""`--watch`: lists INPUT periodically, yields each new file once, and retries failed ones."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from services.augmenter.domain import FileTask
from services.common.errors import FileError
from services.common.storage.errors import FileMissingError

# Names of files begin with their time in seconds since the epoch.
_EPOCH_SECONDS = re.compile(r"\d{10}(?=\D|$)")
_MAX_RETRY_WAIT_SECONDS = 600.0
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _WatchedFile:
    """A file that was yielded: its state then, how often it failed, and when it may be retried."""

    state: tuple[str, bool]
    in_progress: bool = False
    failures: int = 0
    retry_at: float = 0.0

    @property
    def is_due(self) -> bool:
        """Return whether the file failed and its backoff is over."""
        return bool(self.failures) and not self.in_progress and time.monotonic() >= self.retry_at


class Watcher:
    """Yields new and changed files.

    State: `_files`, those of the last listing (so --lookback bounds them), and older ones that are in
    progress or failed; `_newest_second`, the latest time in a name, from which --lookback counts. Names may
    have times of the past (a replay); times in the future are ignored.
    """

    def __init__(
        self,
        list_tasks: Callable[[str], AsyncGenerator[FileTask]],
        find_task: Callable[[str], Awaitable[FileTask]],
        *,
        poll_interval_seconds: float,
        lookback_seconds: float,
        on_first_listing: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._list_tasks = list_tasks
        self._find_task = find_task
        self._poll_interval_seconds = poll_interval_seconds
        self._lookback_seconds = lookback_seconds
        self._on_first_listing = on_first_listing
        self._files: dict[str, _WatchedFile] = {}
        self._newest_second = 0

    async def tasks(self) -> AsyncIterator[FileTask]:
        """Yield tasks without end. The first listing covers all of INPUT, and its failure is raised."""
        is_first = True
        while True:
            try:
                async with aclosing(self._poll()) as new_tasks:
                    async for task in new_tasks:
                        yield task
            except FileError as error:
                if is_first:
                    raise
                _log.warning("%s; listing again in %.0f s", error, self._poll_interval_seconds)
            if is_first and self._on_first_listing:
                await self._on_first_listing()
            is_first = False
            await asyncio.sleep(self._poll_interval_seconds)

    async def _poll(self) -> AsyncGenerator[FileTask]:
        now = time.time()
        listed_names: set[str] = set()
        async with aclosing(self._list_tasks(self._cutoff(now))) as listed_tasks:
            async for task in listed_tasks:
                self._update_newest_second(task.file.name, now)
                listed_names.add(task.file.name)
                if self._start_if_due(task):
                    yield task
        for name in [name for name in self._files if name not in listed_names]:
            retried_task = await self._recheck_unlisted(name)
            if retried_task and self._start_if_due(retried_task):
                yield retried_task

    def _start_if_due(self, task: FileTask) -> bool:
        """Return whether to process the file now. If so, it is in progress until `on_end` is called."""
        watched = self._files.get(task.file.name)
        if watched is None or watched.state != task.file.state:
            watched = _WatchedFile(task.file.state)
            self._files[task.file.name] = watched
        elif not watched.is_due:
            return False
        watched.in_progress = True
        return True

    async def _recheck_unlisted(self, name: str) -> FileTask | None:
        """Return the task of a file that is older than the listing, if it is to be retried.

        The file is forgotten once it is neither in progress nor failed.
        """
        watched = self._files[name]
        if watched.is_due:
            try:
                return await self._find_task(name)
            except FileMissingError:
                watched.failures = 0
            except FileError as error:
                _log.warning("%s", error)
                self._schedule_retry(watched)
        if not watched.in_progress and not watched.failures:
            del self._files[name]
        return None

    def on_end(self, task: FileTask, outcome: str) -> None:
        """Record the outcome of a file. A failed one is retried, with a longer backoff each time."""
        watched = self._files.get(task.file.name)
        if watched is None or watched.state != task.file.state:
            return
        watched.in_progress = False
        if outcome == "failed":
            self._schedule_retry(watched)
        else:
            watched.failures = 0

    def _schedule_retry(self, watched: _WatchedFile) -> None:
        wait = min(_MAX_RETRY_WAIT_SECONDS, self._poll_interval_seconds * 2.0 ** min(watched.failures, 16))
        watched.failures += 1
        watched.retry_at = time.monotonic() + wait

    def _cutoff(self, now: float) -> str:
        """Return the name after which the next listing begins."""
        newest_second = min(self._newest_second, int(now))
        return (
            str(int(newest_second - self._lookback_seconds)) if newest_second > self._lookback_seconds else ""
        )

    def _update_newest_second(self, name: str, now: float) -> None:
        found = _EPOCH_SECONDS.match(name)
        if found and int(found[0]) <= now:
            self._newest_second = max(self._newest_second, int(found[0]))
