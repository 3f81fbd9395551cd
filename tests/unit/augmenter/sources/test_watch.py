"""Tests of which files `--watch` yields, and when it retries them."""

import asyncio
from collections.abc import AsyncGenerator

from services.augmenter.domain import FileTask
from services.augmenter.sources.watch import Watcher
from services.common.codec import PLAIN
from services.common.storage.errors import FileMissingError
from services.common.storage.protocol import FileInfo


async def test_lookback_counts_from_the_newest_name() -> None:
    """A later listing begins --lookback before the newest time in a name, ignoring times in the future."""
    listed_after: list[str] = []

    async def listing(after: str) -> AsyncGenerator[FileTask]:
        listed_after.append(after)
        for name in ("1714605540.jsonl", "1714600000.jsonl", "9999999999.jsonl", "deep/1.jsonl"):
            yield FileTask(FileInfo(name, 1, "v", 0), name, PLAIN)

    watcher = Watcher(listing, _find_nothing, poll_interval_seconds=0.001, lookback_seconds=3600)
    tasks = watcher.tasks()
    yielded = [await anext(tasks) for _ in range(4)]
    watcher.on_end(yielded[3], "failed")
    assert (await anext(tasks)).file.name == "deep/1.jsonl"
    assert listed_after[:2] == ["", "1714601940"]


async def test_failed_file_is_retried_after_the_lookback() -> None:
    """A failed file that is older than --lookback is looked up by name until it is done, or gone."""
    names = ["1714000000.jsonl", "1714000001.jsonl", "1714605540.jsonl"]
    looked_up: list[str] = []

    async def listing(after: str) -> AsyncGenerator[FileTask]:
        for name in sorted(names):
            if name > after:
                yield _task(name)

    async def find(name: str) -> FileTask:
        looked_up.append(name)
        if name not in names:
            raise FileMissingError(uri=name, reason="does not exist")
        return _task(name)

    watcher = Watcher(listing, find, poll_interval_seconds=0.001, lookback_seconds=3600)
    tasks = watcher.tasks()
    yielded = [await anext(tasks) for _ in range(3)]
    names.remove("1714000001.jsonl")
    watcher.on_end(yielded[1], "failed")
    for _ in range(3):
        watcher.on_end(yielded[0], "failed")
        assert (await asyncio.wait_for(anext(tasks), 5)).file.name == "1714000000.jsonl"
    watcher.on_end(yielded[0], "done")
    names.append("1714605541.jsonl")
    assert (await asyncio.wait_for(anext(tasks), 5)).file.name == "1714605541.jsonl"
    assert looked_up.count("1714000000.jsonl") == 3
    assert looked_up.count("1714000001.jsonl") == 1


def _task(name: str) -> FileTask:
    return FileTask(FileInfo(name, 1, "v", 0), name, PLAIN)


async def _find_nothing(name: str) -> FileTask:
    raise FileMissingError(uri=name, reason="does not exist")
