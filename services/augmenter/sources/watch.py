"""`--watch`: INPUT listed again and again, each file done once, those that failed tried again."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from services.augmenter.sources.listing import FileTask
from services.common.errors import FileError
from services.common.storage.errors import FileMissingError

_EPOCH_SECONDS = re.compile(r"\d{10}(?=\D|$)")  # how files are named: the second that they are of
_MAX_RETRY_WAIT_SECONDS = 600.0
_log = logging.getLogger("augmenter")


@dataclass(slots=True)
class _WatchedFile:
    """A file's state when it was given out, how often it failed, and when it may be tried again."""

    state: tuple[str, bool]
    in_progress: bool = False
    failures: int = 0
    retry_at: float = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it failed, and its wait is over."""
        return bool(self.failures) and not self.in_progress and time.monotonic() >= self.retry_at


class Watcher:
    """Gives out what is new.

    State: `_seen`, the files of the last listing (so it is bounded by --lookback), and older ones that are in
    work or failed; `_newest`, the latest second that a name told, from which --lookback counts: names may be
    of the past (a replay), never of the future.
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
        """Without end. The first listing is of everything, and must succeed."""
        first = True
        while True:
            try:
                async with aclosing(self._poll()) as found:
                    async for job in found:
                        yield job
            except FileError as error:
                if first:
                    raise
                _log.warning("%s; listing again in %.0f s", error, self._poll_interval_seconds)
            if first and self._on_first_listing:
                await self._on_first_listing()
            first = False
            await asyncio.sleep(self._poll_interval_seconds)

    async def _poll(self) -> AsyncGenerator[FileTask]:
        now = time.time()
        listed: set[str] = set()
        async with aclosing(self._list_tasks(self._cutoff(now))) as jobs:
            async for job in jobs:
                self._update_newest_second(job.file.name, now)
                listed.add(job.file.name)
                if self._start_if_due(job):
                    yield job
        for name in [name for name in self._files if name not in listed]:
            job_again = await self._recheck_unlisted(name)
            if job_again and self._start_if_due(job_again):
                yield job_again

    def _start_if_due(self, task: FileTask) -> bool:
        """Whether it is to be given out; then it is in work, until `ended` says what came of it."""
        known = self._files.get(task.file.name)
        if known is None or known.state != task.file.state:
            known = self._files[task.file.name] = _WatchedFile(task.file.state)
        elif not known.is_due:
            return False
        known.in_progress = True
        return True

    async def _recheck_unlisted(self, name: str) -> FileTask | None:
        """A file that the listing passed, if it is to be tried again; it is forgotten once that is over."""
        known = self._files[name]
        if known.is_due:
            try:
                return await self._find_task(name)
            except FileMissingError:
                known.failures = 0
            except FileError as error:
                _log.warning("%s", error)
                self._schedule_retry(known)
        if not known.in_progress and not known.failures:
            del self._files[name]
        return None

    def on_end(self, task: FileTask, outcome: str) -> None:
        """A file that was given out is done, or failed: then it is tried again, later every time."""
        known = self._files.get(task.file.name)
        if known is None or known.state != task.file.state:
            return
        known.in_progress = False
        if outcome == "failed":
            self._schedule_retry(known)
        else:
            known.failures = 0

    def _schedule_retry(self, watched: _WatchedFile) -> None:
        wait = min(_MAX_RETRY_WAIT_SECONDS, self._poll_interval_seconds * 2.0 ** min(watched.failures, 16))
        watched.failures += 1
        watched.retry_at = time.monotonic() + wait

    def _cutoff(self, now: float) -> str:
        """The name behind which a listing begins."""
        latest = min(self._newest_second, int(now))
        return str(int(latest - self._lookback_seconds)) if latest > self._lookback_seconds else ""

    def _update_newest_second(self, name: str, now: float) -> None:
        found = _EPOCH_SECONDS.match(name)
        if found and int(found[0]) <= now:
            self._newest_second = max(self._newest_second, int(found[0]))
