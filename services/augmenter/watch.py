"""`--watch`: INPUT listed again and again, each file done once, those that failed tried again."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from services.augmenter.jobs import Job
from services.common.errors import FileError

_EPOCH = re.compile(r"\d{10}(?=\D|$)")  # how files are named: the second that they are of
_LONGEST_WAIT_SECONDS = 600.0
_log = logging.getLogger("augmenter")


@dataclass(slots=True)
class _Seen:
    """A file's version when it was given out, how often it failed, and when it may be tried again."""

    version: str
    failures: int = 0
    not_before: float = 0.0


class Watcher:
    """Gives out what is new.

    State: `_seen`, the files of the last listing (so it is bounded by --lookback); `_newest`, the latest
    second that a name told, from which --lookback counts: names may be of the past (a replay), never of the
    future.
    """

    def __init__(
        self,
        list_jobs: Callable[[str], AsyncGenerator[Job]],
        *,
        poll_interval_seconds: float,
        lookback_seconds: float,
    ) -> None:
        self._list_jobs = list_jobs
        self._poll_interval_seconds = poll_interval_seconds
        self._lookback_seconds = lookback_seconds
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
            first = False
            await asyncio.sleep(self._poll_interval_seconds)

    async def _new(self) -> AsyncGenerator[Job]:
        now = time.time()
        listed: dict[str, _Seen] = {}
        async with aclosing(self._list_jobs(self._cutoff(now))) as jobs:
            async for job in jobs:
                self._note_second(job.item.name, now)
                known = self._seen.get(job.item.name)
                if known is None or known.version != job.item.version:
                    known = _Seen(job.item.version)
                elif not known.failures or time.monotonic() < known.not_before:
                    listed[job.item.name] = known
                    continue
                listed[job.item.name] = known
                known.not_before = float("inf")  # in work; `ended` says what came of it
                self._seen[job.item.name] = known
                yield job
        self._seen = listed

    def ended(self, job: Job, outcome: str) -> None:
        """A file that was given out is done, or failed: then it is tried again, later every time."""
        known = self._seen.get(job.item.name)
        if known is None or known.version != job.item.version:
            return
        if outcome != "failed":
            known.failures = 0
            return
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
