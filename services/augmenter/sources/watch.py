"""`--watch`: INPUT listed again and again, each file done once, those that failed tried again."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from services.augmenter.sources.listing import Job
from services.common.errors import FileError
from services.common.storage.errors import MissingError

_EPOCH = re.compile(r"\d{10}(?=\D|$)")  # how files are named: the second that they are of
_LONGEST_WAIT_SECONDS = 600.0
_log = logging.getLogger("augmenter")


@dataclass(slots=True)
class _Seen:
    """A file's state when it was given out, how often it failed, and when it may be tried again."""

    state: tuple[str, bool]
    in_work: bool = False
    failures: int = 0
    not_before: float = 0.0

    @property
    def is_due(self) -> bool:
        """Whether it failed, and its wait is over."""
        return bool(self.failures) and not self.in_work and time.monotonic() >= self.not_before


class Watcher:
    """Gives out what is new.

    State: `_seen`, the files of the last listing (so it is bounded by --lookback), and older ones that are in
    work or failed; `_newest`, the latest second that a name told, from which --lookback counts: names may be
    of the past (a replay), never of the future.
    """

    def __init__(
        self,
        list_jobs: Callable[[str], AsyncGenerator[Job]],
        find_job: Callable[[str], Awaitable[Job]],
        *,
        poll_interval_seconds: float,
        lookback_seconds: float,
        first_listed: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._list_jobs = list_jobs
        self._find_job = find_job
        self._poll_interval_seconds = poll_interval_seconds
        self._lookback_seconds = lookback_seconds
        self._first_listed = first_listed
        self._seen: dict[str, _Seen] = {}
        self._newest = 0

    async def jobs(self) -> AsyncIterator[Job]:
        """Without end. The first listing is of everything, and must succeed."""
        first = True
        while True:
            try:
                async with aclosing(self._new()) as found:
                    async for job in found:
                        yield job
            except FileError as error:
                if first:
                    raise
                _log.warning("%s; listing again in %.0f s", error, self._poll_interval_seconds)
            if first and self._first_listed:
                await self._first_listed()
            first = False
            await asyncio.sleep(self._poll_interval_seconds)

    async def _new(self) -> AsyncGenerator[Job]:
        now = time.time()
        listed: set[str] = set()
        async with aclosing(self._list_jobs(self._cutoff(now))) as jobs:
            async for job in jobs:
                self._note_second(job.item.name, now)
                listed.add(job.item.name)
                if self._taken(job):
                    yield job
        for name in [name for name in self._seen if name not in listed]:
            job_again = await self._unlisted(name)
            if job_again and self._taken(job_again):
                yield job_again

    def _taken(self, job: Job) -> bool:
        """Whether it is to be given out; then it is in work, until `ended` says what came of it."""
        known = self._seen.get(job.item.name)
        if known is None or known.state != job.item.state:
            known = self._seen[job.item.name] = _Seen(job.item.state)
        elif not known.is_due:
            return False
        known.in_work = True
        return True

    async def _unlisted(self, name: str) -> Job | None:
        """A file that the listing passed, if it is to be tried again; it is forgotten once that is over."""
        known = self._seen[name]
        if known.is_due:
            try:
                return await self._find_job(name)
            except MissingError:
                known.failures = 0
            except FileError as error:
                _log.warning("%s", error)
                self._put_off(known)
        if not known.in_work and not known.failures:
            del self._seen[name]
        return None

    def ended(self, job: Job, outcome: str) -> None:
        """A file that was given out is done, or failed: then it is tried again, later every time."""
        known = self._seen.get(job.item.name)
        if known is None or known.state != job.item.state:
            return
        known.in_work = False
        if outcome == "failed":
            self._put_off(known)
        else:
            known.failures = 0

    def _put_off(self, known: _Seen) -> None:
        wait = min(_LONGEST_WAIT_SECONDS, self._poll_interval_seconds * 2.0 ** min(known.failures, 16))
        known.failures += 1
        known.not_before = time.monotonic() + wait

    def _cutoff(self, now: float) -> str:
        """The name behind which a listing begins."""
        latest = min(self._newest, int(now))
        return str(int(latest - self._lookback_seconds)) if latest > self._lookback_seconds else ""

    def _note_second(self, name: str, now: float) -> None:
        found = _EPOCH.match(name)
        if found and int(found[0]) <= now:
            self._newest = max(self._newest, int(found[0]))
